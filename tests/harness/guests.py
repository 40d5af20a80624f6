"""Guest processes by themselves: what they are made of, and their memory."""

import os

from migrate.v1 import types_pb2 as types
from tests.harness.waiting import wait_until

PAGE = 4096
MEMORY_BYTES = 16 << 20
KINDS = [types.GUEST_KIND_KVM, types.GUEST_KIND_PROCESS]


def spec_of(kind=types.GUEST_KIND_KVM, vcpus=2):
    workload = types.WorkloadSpec(distribution=types.WORKLOAD_DISTRIBUTION_UNIFORM, write_ratio=0.5, seed=7)
    return types.GuestSpec(name="g", kind=kind, memory_bytes=MEMORY_BYTES, vcpus=vcpus, workload=workload)


def state_of(client):
    return client.look().state


def memfd_of(client):
    _, _, _, (memfd,) = client.describe()
    return memfd


def read_ram(client):
    memfd = memfd_of(client)
    try:
        return bytearray(os.pread(memfd, MEMORY_BYTES, 0))
    finally:
        os.close(memfd)


def write_ram(client, ram):
    memfd = memfd_of(client)
    try:
        for page in range(0, MEMORY_BYTES, PAGE):
            if any(ram[page : page + PAGE]):
                os.pwrite(memfd, ram[page : page + PAGE], page)
    finally:
        os.close(memfd)


def populated(start, spec):
    _, client = start(spec, "source")
    wait_until(lambda: state_of(client) == types.GUEST_STATE_RUNNING, 20, "population")
    touches = client.statistics().touches
    wait_until(lambda: client.statistics().touches > touches + 10_000, 20, "the guest to work")
    return client


def twin_of(start, client):
    """A guest process that waits for that guest; it has neither its RAM nor its state yet."""
    description = client.look().description
    _, twin = start(description, "twin")
    return twin
