"""How a guest is made and on which terms it moves: as keyword arguments with words, and as the messages they make.

The defaults are those of the command line.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict, TypeVar, Unpack

from migrate.config import ORDERS, PEER_TIMEOUT_DEFAULT_US, check_order_word, check_recorded_count
from migrate.errors import ConfigError
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import types_pb2 as types

KINDS = {
    "kvm": types.GUEST_KIND_KVM,
    "process": types.GUEST_KIND_PROCESS,
    "qemu": types.GUEST_KIND_QEMU,
}
WORKLOADS = {
    "uniform": types.WORKLOAD_DISTRIBUTION_UNIFORM,
    "zipf": types.WORKLOAD_DISTRIBUTION_ZIPF,
    "sequential": types.WORKLOAD_DISTRIBUTION_SEQUENTIAL,
    "idle": types.WORKLOAD_DISTRIBUTION_IDLE,
}
MODES = {
    "postcopy": types.MIGRATION_MODE_POSTCOPY,
    "hybrid": types.MIGRATION_MODE_HYBRID,
    "precopy": types.MIGRATION_MODE_PRECOPY,
}
NO_CONVERGENCE = {
    "postcopy": types.NO_CONVERGENCE_POSTCOPY,
    "wait": types.NO_CONVERGENCE_WAIT,
    "fail": types.NO_CONVERGENCE_FAIL,
}
TRANSPORTS = {"native": types.PAGE_TRANSPORT_NATIVE_GRPC, "grpcio": types.PAGE_TRANSPORT_GRPCIO}
DEADLINE_ACTIONS = {
    "stop": types.DEADLINE_ACTION_STOP,
    "poison": types.DEADLINE_ACTION_POISON,
}
COMPRESSIONS = {"none": types.PAGE_COMPRESSION_NONE, "zstd": types.PAGE_COMPRESSION_ZSTD}

_Value = TypeVar("_Value")


class GuestTerms(TypedDict, total=False):
    """What a guest is made of; each may be left out.

    Attributes:
        kind: "kvm" (the default), "process" or "qemu".
        memory_bytes: RAM, whole pages; 1 GiB.
        vcpus: 1.
        workload: Which pages it touches: "uniform" (the default), "zipf", "sequential" or "idle". Not of kind qemu, nor
            is what follows but for qemu_options.
        write_ratio: Share of touches that write, 0 to 1; 0.5.
        working_set_bytes: Bytes touched; 0, the default, is nearly all of RAM.
        touch_rate_per_s: Touches a second for each vCPU; 0, the default, is as fast as it goes.
        seed: Seeds the choice of pages; 1.
        qemu_options: Of kind qemu: words of its command line, without RAM and vCPUs.
    """

    kind: str
    memory_bytes: int
    vcpus: int
    workload: str
    write_ratio: float
    working_set_bytes: int
    touch_rate_per_s: int
    seed: int
    qemu_options: Sequence[str]


class MigrationTerms(TypedDict, total=False):
    """How a guest moves; each may be left out.

    Attributes:
        mode: "hybrid", "precopy" or "postcopy"; None, the default, has the daemon choose.
        order: Of the background: "precopy" (the default), "follow", "bubble", or a policy of the destination: its name,
            or "module:Class".
        recorded_pages: Pages that an earlier run of the guest faulted on, in that order, for an order that goes by them
            ("recorded-set"); none.
        transport: "native" (the default) or "grpcio".
        compression: "none" (the default) or "zstd".
        max_bandwidth_bytes_per_s: Cap of the background; 0, the default, is none.
        downtime_limit_us: In mode precopy, how long the vCPUs may stand still; 50 000.
        on_no_convergence: In mode precopy, what to do if the guest writes faster than its pages move: "postcopy" (the
            default), "wait" or "fail".
        verify: Whether a digest of every page is compared, and one of all memory at the end.
        peer_timeout_us: Silence after which a daemon counts as lost; 5 s.
        deadline_us: How long pages may stay away after the switchover; 0, the default, is for ever.
        on_deadline: What the destination does then: "stop" (the default) ends the guest, "poison" lets it run on.
        trace: Whether every fault is kept for Migrations.trace().
    """

    mode: str | None
    order: str
    recorded_pages: Sequence[int]
    transport: str
    compression: str
    max_bandwidth_bytes_per_s: int
    downtime_limit_us: int
    on_no_convergence: str
    verify: bool
    peer_timeout_us: int
    deadline_us: int
    on_deadline: str
    trace: bool


def guest_spec(name: str, **terms: Unpack[GuestTerms]) -> types.GuestSpec:
    """The message that describes a guest that is to be made.

    Raises:
        ConfigError: a word is not one of those above.
    """
    spec = types.GuestSpec(
        name=name,
        kind=_value(KINDS, "kind", terms.get("kind", "kvm")),
        memory_bytes=terms.get("memory_bytes", 1 << 30),
        vcpus=terms.get("vcpus", 1),
        workload=types.WorkloadSpec(
            distribution=_value(WORKLOADS, "workload", terms.get("workload", "uniform")),
            write_ratio=terms.get("write_ratio", 0.5),
            working_set_bytes=terms.get("working_set_bytes", 0),
            touch_rate_per_s=terms.get("touch_rate_per_s", 0),
            seed=terms.get("seed", 1),
        ),
    )
    if options := terms.get("qemu_options"):
        spec.qemu.options.extend(options)
    return spec


def start_request(guest: str, to: str, **terms: Unpack[MigrationTerms]) -> operator.StartMigrationRequest:
    """The message that starts a migration.

    Raises:
        ConfigError: a word is not one of those above.
    """
    mode = terms.get("mode")
    order = terms.get("order", next(iter(ORDERS)))
    check_order_word(order)
    recorded_pages = terms.get("recorded_pages", ())
    check_recorded_count(len(recorded_pages))
    return operator.StartMigrationRequest(
        guest=guest,
        to=to,
        mode=_value(MODES, "mode", mode) if mode else types.MIGRATION_MODE_UNSPECIFIED,
        order=order,
        recorded_pages=recorded_pages,
        transport=_value(TRANSPORTS, "transport", terms.get("transport", "native")),
        compression=_value(COMPRESSIONS, "compression", terms.get("compression", "none")),
        max_bandwidth_bytes_per_s=terms.get("max_bandwidth_bytes_per_s", 0),
        downtime_limit_us=terms.get("downtime_limit_us", 50_000),
        on_no_convergence=_value(NO_CONVERGENCE, "on_no_convergence", terms.get("on_no_convergence", "postcopy")),
        verify=terms.get("verify", False),
        peer_timeout_us=terms.get("peer_timeout_us", PEER_TIMEOUT_DEFAULT_US),
        deadline_us=terms.get("deadline_us", 0),
        on_deadline=_value(DEADLINE_ACTIONS, "on_deadline", terms.get("on_deadline", "stop")),
        trace=terms.get("trace", False),
    )


def _value(table: Mapping[str, _Value], name: str, word: str) -> _Value:
    try:
        return table[word]
    except KeyError:
        raise ConfigError(f"{name} {word!r} is not one of {', '.join(table)}") from None
