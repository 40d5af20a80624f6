"""What those who watch want to know: who gathers it, when, and that it goes nowhere else."""

from migrate.native.pager import FaultBatch
from migrate.session.live import Live
from migrate.telemetry.faults import FaultLatencies
from migrate.v1 import types_pb2 as types

FIGURES = types.LiveFigures(missing_map=b"\x00\xff")
SAID = types.Migration(live=FIGURES)


class Batch(FaultBatch):
    """Faults of so many microseconds."""

    def __init__(self, *latencies_us):
        self._latencies_us = latencies_us

    def latencies_us(self):
        return list(self._latencies_us)


def test_the_source_hands_on_what_it_was_told_while_somebody_watches():
    live = Live()
    assert not live.is_watched
    with live.watched():
        assert live.is_watched
        assert not live.add_to(types.Migration()).HasField("live")
        live.hand_on(SAID)
        live.hand_on(types.Migration())
        assert live.add_to(types.Migration(migration_id="m")) == types.Migration(migration_id="m", live=FIGURES)


def test_what_the_last_one_saw_is_not_shown_to_the_next():
    live = Live()
    with live.watched(), live.watched():
        live.hand_on(SAID)
    assert not live.is_watched
    live.hand_on(SAID)
    with live.watched():
        assert not live.add_to(types.Migration()).HasField("live")


def test_the_destination_gathers_only_when_asked():
    gathered = []
    live = Live()
    live.gather_by(lambda: gathered.append(1) or FIGURES)
    with live.watched():
        assert gathered == []
        assert live.add_to(types.Migration()).live == FIGURES
    assert gathered == [1]


def test_recent_latencies_are_those_of_the_last_second():
    latencies = FaultLatencies()
    for second in range(20):
        latencies.add(Batch(10 * second + 1, 10 * second + 2), second * 1_000_000)

    recent = latencies.recent(18_500_000)

    assert (recent.count, recent.p50, recent.max) == (2, 191, 192)
    assert latencies.recent(19_500_000).count == 0
    assert latencies.recent(17_000_000).count == 6
    assert (latencies.count, latencies.distribution().count) == (40, 40)
