"""What must hold in the model after every step, and at the end."""

from migrate.errors import GuestHolder
from migrate.session.states import Side, State
from migrate.v1 import types_pb2 as types
from tests.harness.model_guest import PAGE, data_extents

_LOCK_S = 2


def check_step(model):
    """Everything that holds at all times, when nothing moves."""
    assert not model.world.violations, model.world.violations
    _check_one_runs(model)
    for session in (model.source_session, model.destination_session):
        if session is not None:
            _check_record(model, session.record)
    _check_counts(model)
    _check_destination_memory(model)
    _check_source_memory(model)


def _check_one_runs(model):
    running = [guest for guest in [model.source, *model.at_destination.made] if guest.is_running]
    assert len(running) <= 1, "the guest runs on both hosts"


def _check_record(model, record):
    """Holder and error agree with who can run the guest."""
    assert record.lock.acquire(timeout=_LOCK_S), "a session holds its record's lock while it waits for somebody"
    record.lock.release()
    shown = record.snapshot()
    twin_has_run = any(twin.has_run for twin in model.at_destination.made)
    holder = GuestHolder(shown.holder)
    if record.state in (State.FAILED, State.CANCELLED):
        assert holder is GuestHolder.SOURCE, f"{record.state}: {shown.error}"
        assert not twin_has_run
    elif record.state is State.COMPLETED:
        assert holder is GuestHolder.DESTINATION
        assert model.twin_runs
    elif record.state in (State.POSTCOPY, State.POSTCOPY_PAUSED):
        assert holder is GuestHolder.SPLIT
        assert twin_has_run
        assert not model.source.is_running
    if shown.HasField("error"):
        assert GuestHolder(shown.error.holder) is holder, f"{record.state} with {shown.error}"
        assert shown.error.type != "IntegrityError", shown.error
    if shown.side == Side.DESTINATION.value and record.state is State.COMPLETED:
        pages = shown.pages
        assert pages.zero + pages.precopy + pages.urgent + pages.background == pages.total


def _check_counts(model):
    counters = model.link.counters() if model.link else None
    if counters is None:
        return
    arrived = counters.zero_pages + counters.precopy_pages + counters.urgent_pages + counters.background_pages
    assert arrived + counters.missing_pages == counters.total_pages == model.pages, counters


def _check_destination_memory(model):
    """A page that is there is right, or is known to be stale by who will say so."""
    twin = model.twin
    if twin is None:
        return
    if twin.has_run:
        known_stale = {touch.page for touch in model.touches}
    elif model.source_state in (State.FAILED, State.CANCELLED, State.CANCELLING) or _has_given_up(model):
        return
    else:
        known_stale = model.source.dirty | model.stale_on_the_way()
    wrong = {
        page
        for first, end in data_extents(twin.memfd)
        for page in range(first, end)
        if page not in known_stale and twin.page(page) != model.reference[page]
    }
    assert not wrong, f"the destination has wrong bytes of {wrong}, and nobody knows"
    counters = model.link.counters() if model.link else None
    if counters is not None and not twin.has_run and not counters.urgent_pages + counters.background_pages:
        held = sum(end - first for first, end in data_extents(twin.memfd))
        assert held == counters.precopy_pages, "a missing page occupies memory, or a present one is a hole"


def _has_given_up(model):
    """Whether an attempt is over that the destination has not heard of yet: the log ends before the guest runs on."""
    if model.source_state is State.PRECOPY:
        return model.source.has_ended_log  # none yet is another thing: what is copied then must be right
    is_between = model.source_state in (State.SETUP, State.SWITCHOVER)
    return is_between and model.source.is_running and not model.source.is_logging


def _check_source_memory(model):
    """The source keeps the guest until END, as it is."""
    if model.has_left:
        return
    assert not model.source.is_dead
    if any(twin.has_run for twin in model.at_destination.made):
        return
    wrong = [page for page in range(model.pages) if model.source.page(page) != model.reference[page]]
    assert not wrong, f"the source's memory changed by itself: {wrong}"


def check_end(model):
    """Whatever happened, the whole guest is somewhere, once."""
    check_step(model)
    assert not model.touches, "a touch was never answered"
    state = model.source_state
    for thread, outcome in model.cancels:
        assert not thread.is_alive()
        if isinstance(outcome[0], types.Migration):
            assert outcome[0].state == types.MIGRATION_STATE_CANCELLED
    if state is State.COMPLETED:
        _check_arrived(model)
    elif state in (State.FAILED, State.CANCELLED):
        _check_stayed(model)
    else:
        raise AssertionError(f"the source is left in {state}, the destination in {model.destination_session}")


def _check_arrived(model):
    assert model.destination_session.record.state is State.COMPLETED
    assert model.at_source.names == []
    assert model.twin.is_running
    wrong = [page for page in range(model.pages) if model.twin.page(page) != model.reference[page]]
    assert not wrong, f"pages {wrong} of the guest that arrived are wrong"
    assert model.at_destination.hosted(model.twin._description.spec.name).migration_id == ""


def _check_stayed(model):
    assert model.source.is_running, "the guest stays at the source, and does not run"
    assert not model.source.is_logging, "the dirty log goes on"
    assert model.at_source.hosted("g").migration_id == "", "the guest is still claimed"
    session = model.destination_session
    assert session is None or session.record.state in (State.FAILED, State.CANCELLED)
    assert all(twin.is_dead for twin in model.at_destination.made), "the destination keeps a twin"
    assert model.at_destination.names == []
    assert PAGE * model.pages == model.source.pages * PAGE
