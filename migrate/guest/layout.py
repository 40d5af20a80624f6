"""Where everything lies in the RAM of a guest of ours, kvm or process. Pure arithmetic.

0x1000  parameters | page tables | code | one state page per vCPU | one stack page per vCPU | versions | workload
"""

from dataclasses import dataclass

from migrate.errors import ConfigError
from migrate.native.machine import PAGE_TABLE_GPA, VCPUS_MAX, PayloadParams
from migrate.units import PAGE_SIZE_BYTES, bytes_to_pages, format_bytes, pages_to_bytes
from migrate.v1 import types_pb2 as types

_CODE_PAGES = 4
_VERSION_BYTES = 8
_IDLE_TOUCHES_PER_S = 100
_C_DISTRIBUTIONS = {
    types.WORKLOAD_DISTRIBUTION_UNIFORM: 1,
    types.WORKLOAD_DISTRIBUTION_ZIPF: 2,
    types.WORKLOAD_DISTRIBUTION_SEQUENTIAL: 3,
    types.WORKLOAD_DISTRIBUTION_IDLE: 1,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Addresses in guest RAM, all whole pages."""

    code_gpa: int
    state_gpa: int
    stack_gpa: int
    table_gpa: int
    first_page: int
    working_pages: int


def check_workload_spec(spec: types.GuestSpec) -> None:
    """Whether such a guest of ours can exist, as far as its vCPUs and its workload go.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    if not 1 <= spec.vcpus <= VCPUS_MAX:
        raise ConfigError(f"a guest has 1 to {VCPUS_MAX} vCPUs, not {spec.vcpus}")
    if spec.workload.distribution not in _C_DISTRIBUTIONS:
        raise ConfigError("a workload is uniform, zipf, sequential or idle")
    if not 0 <= spec.workload.write_ratio <= 1:
        raise ConfigError(f"a write ratio lies between 0 and 1, {spec.workload.write_ratio} does not")
    most = _most_working_pages(spec)
    if spec.workload.working_set_bytes and not spec.vcpus <= bytes_to_pages(spec.workload.working_set_bytes) <= most:
        raise ConfigError(
            f"a working set in {format_bytes(spec.memory_bytes)} has {format_bytes(pages_to_bytes(spec.vcpus))}"
            f" to {format_bytes(pages_to_bytes(most))}"
        )


def layout_of(spec: types.GuestSpec) -> Layout:
    """The layout of a checked spec."""
    working_pages = bytes_to_pages(spec.workload.working_set_bytes) or _most_working_pages(spec)
    code_page = _first_free_page(spec)
    state_page = code_page + _CODE_PAGES
    stack_page = state_page + spec.vcpus
    table_page = stack_page + spec.vcpus
    return Layout(
        code_gpa=pages_to_bytes(code_page),
        state_gpa=pages_to_bytes(state_page),
        stack_gpa=pages_to_bytes(stack_page),
        table_gpa=pages_to_bytes(table_page),
        # At the top of RAM, so that there is room between for whatever comes to live there.
        first_page=bytes_to_pages(spec.memory_bytes) - working_pages,
        working_pages=working_pages,
    )


def payload_params(spec: types.GuestSpec, layout: Layout, tsc_khz: int) -> PayloadParams:
    """What the workload of a guest is told."""
    workload = spec.workload
    rate_per_s = workload.touch_rate_per_s
    if workload.distribution == types.WORKLOAD_DISTRIBUTION_IDLE and not rate_per_s:
        rate_per_s = _IDLE_TOUCHES_PER_S
    return PayloadParams(
        distribution=_C_DISTRIBUTIONS[workload.distribution],
        write_threshold=round(workload.write_ratio * 2**32),
        working_pages=layout.working_pages,
        first_page=layout.first_page,
        table_gpa=layout.table_gpa,
        state_gpa=layout.state_gpa,
        vcpus=spec.vcpus,
        ticks_per_touch=tsc_khz * 1000 // rate_per_s if rate_per_s else 0,
        checks_fpu=int(spec.kind == types.GUEST_KIND_KVM),
    )


def _first_free_page(spec: types.GuestSpec) -> int:
    """Behind the page tables: PML4, PDPT, one directory for each GiB of RAM, one for the device."""
    gibs = (spec.memory_bytes + (1 << 30) - 1) >> 30
    return bytes_to_pages(PAGE_TABLE_GPA) + 2 + gibs + 1


def _most_working_pages(spec: types.GuestSpec) -> int:
    """As many as fit with their versions behind them."""
    free = bytes_to_pages(spec.memory_bytes) - _first_free_page(spec) - _CODE_PAGES - 2 * spec.vcpus
    return (free - 1) * PAGE_SIZE_BYTES // (PAGE_SIZE_BYTES + _VERSION_BYTES)
