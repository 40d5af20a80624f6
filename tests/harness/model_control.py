"""The control calls of the model: each is a message that is delivered, answered, late or lost when the model says so.

A call's handler runs in a thread of its own, as at a gRPC server, and goes on when its caller has given up.
"""

import threading

from migrate.error_info import error_info, error_of
from migrate.errors import ChannelError, MigrateError
from migrate.v1 import types_pb2 as types

SENT, RUNNING, ANSWERED = "sent", "running", "answered"


class Call:
    """One call. `caller` is None once it has given up.

    Args:
        name: Of the method.
        handle: What the peer does of it.
        request: The message, if anybody wants to look at it.
    """

    def __init__(self, name, handle, request):
        self.request = request
        self.delivered_us = None
        self.name = name
        self.handle = handle
        self.stage = SENT
        self.caller = threading.current_thread()
        self.handler = None
        self.result = self.error = None
        self.is_lost = self.is_over = False

    def __repr__(self):
        return f"{self.name}:{self.stage}{'' if self.caller else ':late'}"


class Control:
    """All calls that are under way, in order of their making.

    Args:
        world: Shared state.
    """

    def __init__(self, world):
        self._world = world
        self.calls = []
        self.is_down = False

    def call(self, name, handle, request=None):
        """Called by a session: make one, wait for what becomes of it."""
        with self._world.changed:
            if self.is_down:
                raise ChannelError("the peer is silent")
            call = Call(name, handle, request)
            self.calls.append(call)
            self._world.block(name, lambda: call.is_over)
        if call.is_lost:
            raise ChannelError(f"the answer to {name} was lost")
        if call.error is not None:
            raise call.error
        return call.result

    def deliver(self, call):
        """The message arrives at the peer."""
        with self._world.changed:
            assert call.stage == SENT
            call.stage = RUNNING
            call.delivered_us = self._world.now_us
        call.handler = self._world.spawn(f"handle-{call.name}", lambda: self._handle(call))

    def answer(self, call):
        """The answer arrives at the caller."""
        assert call.stage == ANSWERED
        self._end(call, is_lost=False)

    def give_up(self, call, *, will_arrive):
        """The caller learns nothing; the message may arrive all the same, later."""
        self._end(call, is_lost=True)
        if call.stage == SENT and not will_arrive:
            with self._world.changed:
                self.calls.remove(call)

    def go_down(self):
        """Every call fails from now on, those that wait too."""
        with self._world.changed:
            self.is_down = True
            calls = list(self.calls)
        for call in calls:
            self.give_up(call, will_arrive=False)

    def _end(self, call, *, is_lost):
        with self._world.changed:
            caller, call.caller = call.caller, None
            if call.stage == ANSWERED:
                self.calls.remove(call)
            if caller is not None:
                call.is_lost, call.is_over = is_lost, True
                self._world.unblock(caller)

    def _handle(self, call):
        try:
            call.result = call.handle()
        except MigrateError as error:
            call.error = error_of(error_info(error))
        except Exception as error:  # noqa: BLE001 - gRPC answers UNKNOWN
            call.error = ChannelError(f"unknown: {error!r}")
            self._world.violate(f"the handler of {call.name} died: {error!r}")
        with self._world.changed:
            call.stage = ANSWERED
            if call.caller is None:
                self.calls.remove(call)
            self._world.changed.notify_all()


class ModelPeer:
    """The other daemon, as PeerPort.

    Args:
        control: Where the calls go.
        registry_of: The other daemon's MigrationRegistry.
        on_invalidated: Told when the peer has lost the pages of a round.
    """

    def __init__(self, control, registry_of, on_invalidated):
        self._on_invalidated = on_invalidated
        self._control = control
        self._registry_of = registry_of

    def prepare(self, request):
        request = _copy(request)

        return self._control.call("prepare", lambda: self._registry_of().prepare(request, "127.0.0.1"))

    def invalidate(self, request):
        request = _copy(request)

        def handle():
            self._registry_of().invalidate(request)
            self._on_invalidated(request)

        self._control.call("invalidate", handle)

    def switch_over(self, request):
        request = _copy(request)
        return self._control.call("switch_over", lambda: self._registry_of().switch_over(request), request)

    def get_incoming(self, migration_id, await_complete_us=0, *, live=False):
        found = self._control.call(
            "get_incoming", lambda: self._registry_of().incoming(migration_id, await_complete_us, live=live)
        )
        return types.Migration.FromString(found.SerializeToString())

    def complete(self, request):
        request = _copy(request)
        self._control.call("complete", lambda: self._registry_of().complete(request))

    def record_trace(self, request):
        request = _copy(request)
        self._control.call("record_trace", lambda: self._registry_of().record_trace(request))

    def abort(self, migration_id, reason, attempt):
        self._control.call("abort", lambda: self._registry_of().abort(migration_id, reason, attempt))

    def resume_migration(self, request):
        request = _copy(request)
        return self._control.call("resume_migration", lambda: self._registry_of().resume(request, "127.0.0.1"))

    def close(self):
        """Nothing is held."""


def _copy(request):
    return type(request).FromString(request.SerializeToString())
