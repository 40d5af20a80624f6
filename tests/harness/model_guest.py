"""A guest of the model: real memfd, real userfaultfd, a dirty log as KVM keeps it, and no vCPU but the model's steps.

Its RAM is compared with a reference copy, which is what the guest itself believes to have written, wherever it ran.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import threading

from migrate.daemon.guests import GuestRegistry, HostedGuest
from migrate.errors import AlreadyExistsError, GuestBusyError, GuestGoneError, KvmError, UffdUnavailableError
from migrate.guest.memfd import sealed_memfd
from migrate.native import uffd
from migrate.v1 import guest_protocol_pb2 as guest_protocol
from migrate.v1 import types_pb2 as types

PAGE = 4096
WRITTEN_BYTES = 16
_EIO = 5
_STATE = b"the vCPUs of the model after %d touches"


def data_extents(memfd):
    """(first page, end page) of what is no hole."""
    offset = 0
    while True:
        try:
            offset = os.lseek(memfd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        end = os.lseek(memfd, offset, os.SEEK_HOLE)
        yield offset // PAGE, end // PAGE
        offset = end


def _answered(method):
    """What a guest process does when it is told to, behind its gate; it may fail, and does not end in the middle."""

    @functools.wraps(method)
    def answered(self, *args, **more):
        name = method.__name__
        if name in self._slow:
            self._world.pass_gate(name)
        with self._lock:
            if self.is_dead:
                raise GuestGoneError("the guest process is gone")
            if name in self._failing:
                self._failing[name] -= 1
                if self._failing[name] < 0:
                    raise KvmError(name, _EIO)
            return method(self, *args, **more)

    return answered


class ModelGuest:
    """One guest process, as GuestPort.

    Args:
        world: Shared state.
        description: Of the guest.
        slow: Methods that wait at a gate.
        failing: Methods that fail, and after how many calls.
        on_resume: Told before the vCPUs run; raises if they must not.
    """

    def __init__(self, world, description, *, slow=(), failing=None, on_resume=lambda: None):
        self._world = world
        self._description = description
        self._slow = slow
        self._failing = dict(failing or {})
        self._lock = threading.Lock()
        self._on_resume = on_resume
        self.pages = description.spec.memory_bytes // PAGE
        self.memfd = sealed_memfd("model", self.pages * PAGE)
        self._ram = mmap.mmap(self.memfd, self.pages * PAGE)
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        self._uffd = None
        self._log_memfd = None
        self.has_ended_log = False
        self.dirty = set()
        self.taken = set()  # synced, so the source owes its destination these
        self.kept = set()  # of the log, told once
        self.touches = 0
        self.is_running = self.has_run = self.is_loaded = self.is_dead = False
        self.instance = f"instance-{id(self):x}"

    # ---- GuestPort ----

    @_answered
    def describe(self):
        description = types.GuestDescription()
        description.CopyFrom(self._description)
        description.regions.add(
            region=0, size_bytes=self.pages * PAGE, resident_bytes=os.fstat(self.memfd).st_blocks * 512
        )
        return description, types.GUEST_STATE_RUNNING, os.getpid(), [os.dup(self.memfd)]

    @_answered
    def pause(self):
        self.is_running = False

    @_answered
    def resume(self):
        if not self.is_loaded:
            raise GuestBusyError("the guest has not arrived yet")
        self._on_resume()
        self.is_running = self.has_run = True

    @_answered
    def save_state(self):
        assert not self.is_running
        return _STATE % self.touches, self.touches

    @_answered
    def load_state(self, state):
        if self.is_loaded:
            raise GuestBusyError("the guest has a state already")
        touches = int(state.split()[-2])
        assert state == _STATE % touches
        self.touches = touches
        self.is_loaded = True

    @_answered
    def arm(self):
        self._uffd = open_uffd()
        uffd.register_missing(self._uffd, self.hva, self.pages * PAGE)
        return os.dup(self._uffd), [self.hva]

    @_answered
    def look(self):
        return guest_protocol.DescribeResponse(is_armed=self.is_registered, has_dirty_log=True)

    @_answered
    def disarm(self):
        self._unregister()

    @_answered
    def start_dirty_log(self):
        if self._log_memfd is None:
            self._log_memfd = sealed_memfd("model-dirty", -(-self.pages // 64) * 8)
        self.dirty = set()
        self.has_ended_log = False
        return os.dup(self._log_memfd)

    @_answered
    def sync_dirty_log(self, *, keep=False):
        if self._log_memfd is None:
            raise GuestBusyError("no dirty log was begun")
        bits = sum(1 << page for page in self.dirty)
        os.pwrite(self._log_memfd, bits.to_bytes(-(-self.pages // 64) * 8, "little"), 0)
        count = len(self.dirty)
        self.taken |= self.dirty - self.kept
        if keep:
            self.kept = set(self.dirty)
        else:
            self.dirty = set()
        return count

    @_answered
    def stop_dirty_log(self):
        if self._log_memfd is not None:
            os.close(self._log_memfd)
            self._log_memfd = None
            self.has_ended_log = True

    @_answered
    def statistics(self, *, with_stalls=False):
        return types.GuestStatistics(touches=self.touches)

    def close(self):
        """GuestClient's: the guest lives on."""

    # ---- for the model ----

    @property
    def is_logging(self):
        return self._log_memfd is not None

    @property
    def is_registered(self):
        """Whether a touch of what is missing waits."""
        return self._uffd is not None

    def write(self, page, data):
        """The guest writes while it runs at the source: never armed memory."""
        assert self.is_running
        assert self._uffd is None
        os.pwrite(self.memfd, data, page * PAGE)
        self.touches += 1
        if self.is_logging:
            self.dirty.add(page)

    def is_populated(self, page):
        """Whether the memfd has the page."""
        return any(first <= page < end for first, end in data_extents(self.memfd))

    def page(self, page):
        """What is in the memfd; makes no page."""
        return os.pread(self.memfd, PAGE, page * PAGE)

    def kill(self):
        """End the process: memory, log and userfaultfd are gone."""
        with self._lock:
            if self.is_dead:
                return
            self.is_dead = True
            self.is_running = False
            self._unregister()
            if self._log_memfd is not None:
                os.close(self._log_memfd)
                self._log_memfd = None
            os.close(self.memfd)

    def free(self):
        """Once nobody touches it any more: the mapping goes."""
        self._ram.close()

    def _unregister(self):
        if self._uffd is not None:
            uffd.unregister(self._uffd, self.hva, self.pages * PAGE)
            os.close(self._uffd)
            self._uffd = None


class ModelTouch:
    """One touch of armed memory, in a thread that waits in libc with the GIL dropped."""

    def __init__(self, world, guest, page, written):
        self.page = page
        self._guest = guest
        self._written = written
        self._found = ctypes.create_string_buffer(PAGE)
        self._thread = world.spawn(f"touch-{page}", self._run)

    @property
    def is_done(self):
        return not self._thread.is_alive()

    @property
    def found(self):
        """What the guest read, after its own write."""
        return self._found.raw

    def _run(self):
        address = self._guest.hva + self.page * PAGE
        if self._written is not None:
            offset, data = self._written
            ctypes.memmove(address + offset, data, len(data))
        ctypes.memmove(self._found, address, PAGE)


def open_uffd():
    """Kernel faults if they are to be had; the model's touches are user code, so the other kind suffices."""
    with contextlib.suppress(UffdUnavailableError):
        return uffd.open_uffd(user_mode_only=False)
    return uffd.open_uffd(user_mode_only=True)


class ModelGuests(GuestRegistry):
    """The guests of one host, whose "processes" are of the model.

    Args:
        make: A guest for a description.
        on_kill: Told before a guest's process ends.
    """

    def __init__(self, make, on_kill):
        super().__init__(None)
        self._make = make
        self._on_kill = on_kill
        self.made = []

    def create_incoming(self, description, migration_id):
        return self.add(description, migration_id)

    def add(self, description, migration_id=""):
        name = description.spec.name
        with self._lock:
            if name in self._guests:
                raise AlreadyExistsError(f"a guest named {name!r} is on this host already")
            self._guests[name] = None
        guest = self._make(description)
        self.made.append(guest)
        hosted = HostedGuest(description.spec, _Process(guest, self._on_kill), guest, migration_id)
        with self._lock:
            self._guests[name] = hosted
        return hosted

    @property
    def names(self):
        with self._lock:
            return list(self._guests)

    def hosted(self, name):
        with self._lock:
            return self._guests.get(name)


class _Process:
    def __init__(self, guest, on_kill):
        self._guest = guest
        self._on_kill = on_kill

    def kill(self):
        if not self._guest.is_dead:
            self._on_kill(self._guest)
        self._guest.kill()
