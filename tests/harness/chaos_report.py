"""What many runs of chaos come to: by kind of event, by barrier, in all."""

import statistics
from collections import Counter, defaultdict

from migrate.barriers import Point
from tests.harness.chaos_plan import Kind

# So many events planned at a point and none that found a daemon there: it is no point of a migration.
_PLANNED_MIN = 3


def unreached(outcomes):
    """The points at which something was to happen again and again, and never did: such runs prove nothing of them."""
    planned = Counter(event.barrier for outcome in outcomes for event in outcome.plan.events)
    reached = {event.barrier for outcome in outcomes for event in outcome.happened()}
    return [point.value for point in Point if planned[point] >= _PLANNED_MIN and point not in reached]


def totals(seed, outcomes):
    """One object; all is perfect if `runs` equals `completed` and `unreached` is empty."""
    return {
        "seed": seed,
        "runs": len(outcomes),
        "completed": sum(not outcome.problems for outcome in outcomes),
        "failed": [outcome.plan.number for outcome in outcomes if outcome.problems],
        "unreached": unreached(outcomes),
        "events": sum(len(outcome.happened()) for outcome in outcomes),
        "kills": sum(event.kind.value.startswith("kill") for outcome in outcomes for event in outcome.happened()),
        "guest_errors": sum(outcome.guest_errors for outcome in outcomes),
        "recoveries": sum(outcome.recoveries for outcome in outcomes),
        "further_attempts": sum(max(0, outcome.attempts - 1) for outcome in outcomes),
        "compared_pages": sum(outcome.compared_pages for outcome in outcomes),
        "two_copies_seen": sum(outcome.seen_twice for outcome in outcomes),
        "looks_for_two_copies": sum(outcome.looks for outcome in outcomes),
        "seconds_median": _median([outcome.seconds for outcome in outcomes if not outcome.problems]),
        "added_seconds_median": _median([outcome.added_seconds for outcome in outcomes]),
        "problems": {outcome.plan.number: outcome.problems for outcome in outcomes if outcome.problems},
    }


def as_markdown(seed, outcomes):
    """What docs/reliability.md shows of all runs."""
    found = totals(seed, outcomes)
    return f"""\
Seed {seed}: {found["runs"]} runs, {found["completed"]} perfect; \
{found["events"]} events, of which {found["kills"]} kills.
{found["guest_errors"]} guest errors, {found["compared_pages"]:,} pages compared byte for byte besides, \
two copies seen {found["two_copies_seen"]} times in {found["looks_for_two_copies"]:,} looks.
{found["further_attempts"]} further attempts before a switchover, {found["recoveries"]} recoveries after one; \
median {found["seconds_median"]} s, of which {found["added_seconds_median"]} s added by the events.

{tables(outcomes)}"""


def tables(outcomes):
    """Two tables in Markdown. A run counts in each row of which at least one event befell it."""
    by_kind, by_barrier = defaultdict(list), defaultdict(list)
    for outcome in outcomes:
        events = outcome.happened()
        for kind in {event.kind for event in events}:
            by_kind[kind.value].append(outcome)
        for barrier in {event.barrier for event in events} - {None}:
            by_barrier[f"`{barrier.value}`"].append(outcome)
        if any(event.barrier is None for event in events):
            by_barrier["a random moment"].append(outcome)
    moments = [*(f"`{point.value}`" for point in Point), "a random moment"]
    return "\n\n".join(
        [
            _table("Event", [kind.value for kind in Kind], by_kind),
            _table("At", moments, by_barrier),
        ]
    )


def _table(heading, rows, outcomes_of):
    lines = [f"| {heading} | Runs | Completed | Median added, s |", "|---|---:|---:|---:|"]
    for row in rows:
        outcomes = outcomes_of[row]
        completed = [outcome for outcome in outcomes if not outcome.problems]
        added = _median([outcome.added_seconds for outcome in completed])
        lines.append(f"| {row} | {len(outcomes)} | {len(completed)} | {'-' if added is None else added} |")
    return "\n".join(lines)


def _median(values):
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 2) if known else None
