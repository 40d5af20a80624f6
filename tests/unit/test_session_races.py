"""Named races between the two sessions, each of which was once lost; the model of tests/property found them.

They run on that model's real sessions, pagers and page sources, in the one order that matters.
"""

import threading

import pytest

from migrate.errors import GuestBusyError, GuestHolder
from migrate.session import backoff, destination, precopy, serving, source
from migrate.session.states import State
from migrate.v1 import types_pb2 as types
from tests.harness.model import LONG_US, Model, Plan
from tests.harness.model_checks import check_end, check_step
from tests.harness.model_control import ANSWERED, SENT
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd

PAGES = 48


@pytest.fixture
def start(monkeypatch):
    """Makes a model of a migration; whatever a test did to it, the whole guest is somewhere at the end."""
    monkeypatch.setattr(source, "_POLL_S", 0.001)
    monkeypatch.setattr(serving, "_POLL_S", 0.001)
    for module, first, longest in (
        (backoff, "RETRY_FIRST_S", "RETRY_MAX_S"),
        (source, "_ATTEMPT_FIRST_S", "_ATTEMPT_MAX_S"),
    ):
        monkeypatch.setattr(module, first, 0.001)
        monkeypatch.setattr(module, longest, 0.001)
    monkeypatch.setattr(precopy, "_AWAIT_US", 1_000)
    monkeypatch.setattr(destination, "_OBSERVE_S", 0.001)
    made = []

    def make(mode=types.MIGRATION_MODE_POSTCOPY, **plan):
        plan = {"filled": (1, 2, 3, None) * (PAGES // 4), **plan}
        plan = {"order": "precopy", "verify": False, "on_no_convergence": types.NO_CONVERGENCE_POSTCOPY, **plan}
        made.append(Model(Plan(mode=mode, **plan)))
        return made[-1]

    yield make
    for model in made:
        try:
            model.drive()
            check_end(model)
        finally:
            model.close()


def waiting(model, name, *stages):
    """The call of that name that is under way."""
    (call,) = [call for call in model.calls(*(stages or (SENT,))) if call.name == name]
    return call


def lose_answer(model, call):
    model.control.deliver(call)
    model.settle()
    model.control.give_up(call, will_arrive=False)
    model.settle()


def test_source_frees_the_guest_though_end_overtakes_the_answer_to_switchover(start):
    model = start()
    model.pass_call(waiting(model, "prepare"))
    model.control.deliver(waiting(model, "switch_over"))
    model.settle()
    model.flow()
    model.pass_call(waiting(model, "complete"))
    assert model.source_state is State.COMPLETED
    assert not model.has_left
    model.control.answer(waiting(model, "switch_over", ANSWERED))
    model.settle()
    assert model.has_left
    assert model.at_source.names == []


def test_error_that_was_got_over_names_the_holder_of_now(start):
    model = start()
    model.pass_call(waiting(model, "prepare"))
    lose_answer(model, waiting(model, "switch_over"))
    model.drive()
    shown = model.source_session.record.snapshot()
    assert shown.state == types.MIGRATION_STATE_COMPLETED
    assert shown.error.type == "ChannelError"
    assert shown.error.holder == GuestHolder.DESTINATION.value


@pytest.mark.parametrize("method", ["build", "arm"])
def test_prepare_that_is_aborted_while_it_builds_leaves_no_twin(start, method):
    model = start(slow=frozenset({method}))
    prepare = waiting(model, "prepare")
    model.control.deliver(prepare)
    model.settle()
    model.cancel()
    model.control.give_up(prepare, will_arrive=False)
    model.settle()
    model.pass_call(waiting(model, "abort"))
    model.go_on(0, 0)
    model.settle()
    assert model.destination_session.record.state is State.CANCELLED
    assert model.at_destination.names == []
    assert model.twin is None


def test_prepare_that_arrives_after_its_abort_is_refused(start):
    model = start()
    prepare = waiting(model, "prepare")
    model.cancel()
    model.control.give_up(prepare, will_arrive=True)
    model.settle()
    model.pass_call(waiting(model, "abort"))
    model.pass_call(prepare)
    assert model.at_destination.made == []


def test_prepare_that_is_overtaken_by_the_next_attempt_is_refused(start):
    model = start()
    late = waiting(model, "prepare")
    model.control.give_up(late, will_arrive=True)
    model.settle()
    (again,) = [call for call in model.calls(SENT) if call is not late]
    model.pass_call(again)
    model.control.deliver(late)
    model.settle()
    assert len(model.at_destination.made) == 1
    assert model.destination_session.attempt == 2
    assert model.twin is not None


def test_next_attempt_takes_the_place_of_one_whose_answer_was_lost(start):
    model = start(types.MIGRATION_MODE_HYBRID)
    lose_answer(model, waiting(model, "prepare"))
    first = model.twin
    model.pass_call(waiting(model, "prepare"))
    assert first.is_dead
    assert model.twin is not first
    model.drive()
    assert model.source_state is State.COMPLETED
    assert model.source_session.record.snapshot().attempt == 2


def test_pages_flow_again_once_a_page_call_that_failed_for_good_is_made_anew(start):
    model = start()
    model.pass_call(waiting(model, "prepare"))
    model.pass_call(waiting(model, "switch_over"))
    model.touch_what_is_missing(3, 0)
    model.link.fail()
    model.settle()
    assert model.destination_session.record.state is State.POSTCOPY_PAUSED
    model.pass_call(waiting(model, "resume_migration"))
    assert model.destination_session.record.state is State.POSTCOPY
    model.drive()
    assert model.touches == []
    assert model.destination_session.record.snapshot().recoveries == 1


def test_end_whose_answer_is_lost_is_said_again(start):
    model = start()
    model.pass_call(waiting(model, "prepare"))
    model.pass_call(waiting(model, "switch_over"))
    model.flow()
    lose_answer(model, waiting(model, "complete"))
    assert model.source_state is State.COMPLETED
    assert model.destination_session.record.state is State.POSTCOPY
    model.pass_call(waiting(model, "complete"))
    assert model.destination_session.record.state is State.COMPLETED


def test_record_can_be_looked_at_while_a_cancellation_is_undone(start):
    model = start()
    prepare = waiting(model, "prepare")
    model.cancel()
    model.control.give_up(prepare, will_arrive=False)
    model.settle()
    waiting(model, "abort")
    check_step(model)
    seen = []
    looking = threading.Thread(target=lambda: seen.append(model.source_session.record.snapshot()), daemon=True)
    looking.start()
    looking.join(5)
    assert seen, "the record is locked"
    assert seen[0].state == types.MIGRATION_STATE_CANCELLING


def test_cancellation_that_comes_while_the_source_fails_is_carried_out(start):
    model = start(types.MIGRATION_MODE_HYBRID, slow=frozenset({"stop_dirty_log"}))
    model.pass_call(waiting(model, "prepare"))
    lose_answer(model, waiting(model, "invalidate"))
    assert [gate.name for gate, _ in model.world.gates] == ["stop_dirty_log"]
    assert model.source_state is State.PRECOPY
    model.cancel()
    model.go_on(0, 0)
    model.settle()
    model.pass_call(waiting(model, "abort"))
    assert model.source_state is State.CANCELLED
    assert model.source.is_running


def test_switchover_that_waits_for_the_last_pages_is_refused_at_once_when_they_come_no_more(start):
    model = start(types.MIGRATION_MODE_PRECOPY)
    model.pass_call(waiting(model, "prepare"))
    model.pass_call(waiting(model, "invalidate"))
    model.flow()
    model.pass_call(waiting(model, "get_incoming"))
    model.pass_call(waiting(model, "invalidate"))
    model.write(5, 77)
    model.pass_call(waiting(model, "get_incoming"))
    model.pass_call(waiting(model, "invalidate"))
    switch_over = waiting(model, "switch_over")
    model.control.deliver(switch_over)
    model.settle()
    assert switch_over.stage == "running"
    model.link.fail()
    model.settle()
    assert switch_over.stage == ANSWERED
    assert switch_over.error.holder is GuestHolder.SOURCE
    assert "page call broke" in switch_over.error.message
    model.pass_call(switch_over)
    assert model.source.is_running


def test_switchover_that_arrives_twice_does_not_send_the_guest_back(start):
    model = start(slow=frozenset({"load_state"}))
    model.pass_call(waiting(model, "prepare"))
    switch_over = waiting(model, "switch_over")
    model.control.deliver(switch_over)
    model.settle()
    with pytest.raises(GuestBusyError) as refused:
        model.destination_registry.switch_over(switch_over.request)
    assert refused.value.holder is not GuestHolder.SOURCE


def test_end_is_not_reported_while_the_state_is_still_being_loaded(start, monkeypatch):
    monkeypatch.setattr(destination, "SWITCHOVER_DEADLINE_S", 0.01)
    model = start(slow=frozenset({"load_state"}))
    model.pass_call(waiting(model, "prepare"))
    model.control.deliver(waiting(model, "switch_over"))
    model.settle()
    model.flow()
    with model.world.changed:
        is_told = model.world.changed.wait_for(
            lambda: any(call.name == "complete" for call in model.control.calls), 0.5
        )
    assert not is_told
    assert not model.twin.has_run


def test_source_serves_on_though_the_destination_denies_the_migration(start):
    model = start()
    model.pass_call(waiting(model, "prepare"))
    model.pass_call(waiting(model, "switch_over"))
    sessions = model.destination_registry._destinations
    hidden = sessions.pop(model.migration_id)
    poll = waiting(model, "get_incoming")
    model.control.deliver(poll)
    wait_until(lambda: poll.stage == ANSWERED, 5, "the answer")
    sessions[model.migration_id] = hidden
    model.control.answer(poll)
    model.settle()
    assert model.source_state is State.POSTCOPY
    model.flow()
    assert model.link.counters() is None or model.link.counters().missing_pages == 0
    assert not model.link.has_failed


def test_destination_whose_source_never_comes_back_lets_go(start):
    model = start(types.MIGRATION_MODE_HYBRID)
    model.pass_call(waiting(model, "prepare"))
    model.control.go_down()
    wait_until(lambda: model.source_session.record.is_final, 10, "the source to have tried often enough")
    model.settle()
    assert model.source_state is State.FAILED
    assert model.twin is not None
    model.world.now_us += LONG_US
    model.settle()
    assert model.destination_session.record.state is State.CANCELLED
    assert model.twin is None
