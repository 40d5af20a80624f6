"""What still moves in the model: a thread that neither stands at a gate, nor waits for pages, nor has ended."""

from migrate.config import SWITCHOVER_DEADLINE_S
from migrate.session.states import State
from tests.harness.model_control import RUNNING


def moving(model):
    """Words for all that moves; nothing does when it is empty."""
    found = []
    source = thread_of(model, model.source_registry)
    if source is not None and source.is_alive() and source not in model.world.blocked:
        found.append(f"source in {model.source_state}")
    found += _moving_at_destination(model)
    found += [repr(call) for call in model.control.calls if call.stage == RUNNING and _is_call_moving(model, call)]
    found += [f"touch of {touch.page}" for touch in model.touches if _is_touch_moving(model, touch)]
    found += ["cancel" for thread, _ in model.cancels if _is_cancel_moving(model, thread)]
    return found + [thread.name for thread in model.world.threads("fetch-watch") if thread.is_alive()]


def thread_of(model, registry):
    """The thread of a registry's latest session, or None before there is one."""
    name = f"{registry.role}-{model.migration_id}"
    return next((thread for thread in reversed(registry._threads) if thread.name == name), None)


def _moving_at_destination(model):
    thread = thread_of(model, model.destination_registry)
    session = model.destination_session
    if thread is None or not thread.is_alive() or thread in model.world.blocked:
        return []
    state = session.record.state
    if state in (State.SETUP, State.PRECOPY):
        waits = model.world.now_us - session._heard_us <= SWITCHOVER_DEADLINE_S * 1_000_000
    elif state is State.SWITCHOVER:
        waits = True  # for its call
    elif state is State.POSTCOPY_PAUSED:
        waits = model.control.is_down  # else it is about to call
    elif state is State.POSTCOPY:
        counters = model.link.counters()
        is_missing = counters is not None and counters.missing_pages > 0
        is_draining = model.link.is_joining and model.link.is_draining
        waits = is_draining or (is_missing and not _is_tracing(session, counters))
    else:
        waits = False
    return [] if waits else [f"destination in {state}"]


def _is_tracing(session, counters):
    """Whether the trace wants something of the destination's thread, though pages are missing."""
    trace = session._trace
    return trace is not None and (trace.wants_sample(counters.missing_pages) or trace.is_due)


def _is_call_moving(model, call):
    """Whether a call's handler has something to do."""
    if call.handler in model.world.blocked or model.world.is_awaiting(call.handler):
        return False
    if call.name != "switch_over":
        return True
    # It may wait for the last pages, until the clock says that it took too long.
    counters = model.link.counters()
    is_in_time = model.world.now_us < call.delivered_us + call.request.complete_within_us
    is_waiting = model.destination_session.record.state is State.SWITCHOVER and model.link.is_active and is_in_time
    return not (is_waiting and counters is not None and counters.missing_pages)


def _is_touch_moving(model, touch):
    if touch.is_done or not touch.twin.is_registered or touch.twin.is_populated(touch.page):
        return not touch.is_done
    counters = model.link.counters()
    if counters is None:
        return not model.link.has_failed
    # A page that is known to be zero comes without the model.
    return counters.faults <= touch.faults_before or not model.link.is_missing(touch.page)


def _is_cancel_moving(model, thread):
    return thread.is_alive() and model.source_state is not State.CANCELLING
