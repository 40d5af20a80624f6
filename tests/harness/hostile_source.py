"""A source that has no guest: it describes one, and serves pages that a test makes up."""

import contextlib
import itertools

import grpc

from migrate.config import PROTOCOL_VERSION
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types
from tests.harness.fake_source import FakeSource
from tests.harness.memory import PAGE, Memory
from tests.harness.waiting import wait_until

PAGES = 4096
_ENDED = (types.MIGRATION_STATE_FAILED, types.MIGRATION_STATE_CANCELLED)
_numbers = itertools.count()


class HostileSource:
    """Speaks TransferService to a victim as badly as it is told to, and PageService when the victim comes for pages.

    Args:
        victim: The daemon.
        behaviour: Of the pages: options of FakeSource.
    """

    def __init__(self, victim, **behaviour):
        self.stub = victim.daemon.transfer
        self.migration_id = f"hostile-{next(_numbers)}"
        self._memory = Memory(PAGES, fill=lambda page: bytes([page % 255 + 1]) * PAGE)
        self.pages = FakeSource(self._memory, **behaviour)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(grpc.RpcError):  # of what was never here, it may have heard of too many
            self.stub.Abort(transfer.AbortRequest(migration_id=self.migration_id), timeout=30)
        self.pages.close()
        self._memory.close()

    def description(self):
        workload = types.WorkloadSpec(distribution=types.WORKLOAD_DISTRIBUTION_IDLE, write_ratio=0.5, seed=1)
        spec = types.GuestSpec(
            name=self.migration_id,
            kind=types.GUEST_KIND_PROCESS,
            memory_bytes=PAGES * PAGE,
            vcpus=1,
            workload=workload,
        )
        region = types.RamRegion(region=0, size_bytes=PAGES * PAGE, resident_bytes=PAGES * PAGE)
        return types.GuestDescription(spec=spec, page_size_bytes=PAGE, regions=[region])

    def request(self, **fields):
        """What an honest source would ask, but for some fields."""
        asked = transfer.PrepareRequest(
            migration_id=self.migration_id,
            protocol_version=PROTOCOL_VERSION,
            guest=self.description(),
            page_endpoint=str(self.pages.endpoint),
            control_endpoint="127.0.0.1:1",
            token="secret",  # noqa: S106 - nobody else's
            mode=types.MIGRATION_MODE_PRECOPY,
            order="precopy",
            transport=types.PAGE_TRANSPORT_NATIVE_GRPC,
            attempt=1,
            peer_timeout_us=1_000_000,
        )
        for name, value in fields.items():
            setattr(asked, name, value)
        return asked

    def prepare(self, **fields):
        return self.stub.Prepare(self.request(**fields), timeout=30)

    def invalidate(self, **fields):
        asked = transfer.InvalidateRequest(migration_id=self.migration_id, generation=1, fetch=True, attempt=1)
        for name, value in fields.items():
            if name == "stale":
                asked.stale.extend(value)
            else:
                setattr(asked, name, value)
        return self.stub.Invalidate(asked, timeout=30)

    def switch_over(self, **fields):
        return self.stub.Switchover(self.switchover(**fields), timeout=60)

    def switchover(self, **fields):
        return transfer.SwitchoverRequest(migration_id=self.migration_id, **{"attempt": 1, **fields})

    def incoming(self):
        return self.stub.GetIncoming(transfer.GetIncomingRequest(migration_id=self.migration_id), timeout=30).migration

    def fetched_until_it_fails(self, **fields):
        """Have the victim fetch until it has had enough; the migration as it ended there."""
        self.prepare(**fields)
        self.invalidate()

        def ended():
            seen = self.incoming()
            return seen if seen.state in _ENDED else None

        return wait_until(ended, 30, "the destination to give the guest up")
