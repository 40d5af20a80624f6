"""The state tables: what they allow, what they say of the guest, and that nothing in them is dead."""

import pytest

from migrate.errors import GuestHolder, LocalProtocolError
from migrate.session.states import DESTINATION_TABLE, FINAL_STATES, SOURCE_TABLE, Event, Machine, Side, State
from migrate.v1 import types_pb2 as types

TABLES = {Side.SOURCE: SOURCE_TABLE, Side.DESTINATION: DESTINATION_TABLE}


def walk(side, *events):
    machine = Machine(side)
    for event in events:
        machine.on(event)
    return machine


def test_states_and_sides_have_the_numbers_of_the_wire():
    for state in State:
        assert types.MigrationState.Value(f"MIGRATION_STATE_{state.name}") == state.value
    for side in Side:
        assert types.MigrationSide.Value(f"MIGRATION_SIDE_{side.name}") == side.value
    for holder in GuestHolder:
        assert types.GuestHolder.Value(f"GUEST_HOLDER_{holder.name}") == holder.value


@pytest.mark.parametrize("side", Side)
def test_every_state_is_reached_and_every_open_state_can_end(side):
    table = TABLES[side]
    reached, pending = {State.SETUP}, [State.SETUP]
    while pending:
        here = pending.pop()
        for (state, _), after in table.items():
            if state is here and after not in reached:
                reached.add(after)
                pending.append(after)
    assert {state for state, _ in table} <= reached
    assert not {state for state, _ in table} & FINAL_STATES

    can_end = set(FINAL_STATES)
    for _ in State:
        can_end |= {state for (state, _), after in table.items() if after in can_end}
    assert reached <= can_end


def test_every_event_is_used():
    assert {event for table in TABLES.values() for _, event in table} == set(Event)


def test_source_gives_the_guest_away_in_two_steps():
    machine = walk(Side.SOURCE, Event.PREPARED)
    assert (machine.state, machine.holder) == (State.SWITCHOVER, GuestHolder.SOURCE)
    machine.on(Event.RUNNING)
    assert (machine.state, machine.holder) == (State.POSTCOPY, GuestHolder.SPLIT)
    machine.on(Event.END)
    assert (machine.state, machine.holder) == (State.COMPLETED, GuestHolder.DESTINATION)


@pytest.mark.parametrize("events", [(Event.REFUSED,), (Event.PREPARED, Event.REFUSED)])
def test_source_that_was_refused_keeps_the_guest(events):
    machine = walk(Side.SOURCE, *events)
    assert (machine.state, machine.holder) == (State.FAILED, GuestHolder.SOURCE)


@pytest.mark.parametrize("side", Side)
def test_guest_lost_after_the_switchover_is_nowhere(side):
    first = Event.PREPARED if side is Side.SOURCE else Event.SWITCHOVER
    machine = walk(side, first, Event.RUNNING, Event.LINK_LOST, Event.GUEST_LOST)
    assert (machine.state, machine.holder) == (State.FAILED, GuestHolder.NONE)


def test_twin_lost_before_the_switchover_harms_nobody():
    machine = walk(Side.DESTINATION, Event.GUEST_LOST)
    assert (machine.state, machine.holder) == (State.CANCELLED, GuestHolder.SOURCE)


@pytest.mark.parametrize("side", Side)
def test_step_that_is_not_in_the_table_is_refused_and_changes_nothing(side):
    for start in State:
        for event in Event:
            if (start, event) in TABLES[side]:
                continue
            machine = Machine(side)
            machine.state = start
            assert not machine.can(event)
            with pytest.raises(LocalProtocolError):
                machine.on(event)
            assert machine.state is start


def test_destination_never_aborts_once_state_has_arrived():
    assert walk(Side.DESTINATION).can(Event.ABORTED)
    assert not walk(Side.DESTINATION, Event.SWITCHOVER).can(Event.ABORTED)
    assert not walk(Side.DESTINATION, Event.SWITCHOVER, Event.RUNNING).can(Event.ABORTED)
