"""What the numbers in messages mean, in the words of the command line and its JSON."""

from typing import Any

from migrate.v1 import types_pb2 as types

FINAL_STATES = frozenset(
    {types.MIGRATION_STATE_COMPLETED, types.MIGRATION_STATE_CANCELLED, types.MIGRATION_STATE_FAILED}
)
"""A migration in one of these is over."""

SETTLED_STATES = FINAL_STATES | {types.MIGRATION_STATE_POSTCOPY_PAUSED}
"""A migration in one of these is over, or stands still until a daemon or a link is there again."""


def word_of(enum: Any, value: int, prefix: str) -> str:
    """The name of an enum's value without its prefix, in lower case; the number, if only a newer daemon knows it."""
    try:
        name: str = enum.Name(value)
    except ValueError:
        return str(value)
    return name.removeprefix(prefix).lower()


def state_word(state: int) -> str:
    """`completed` for MIGRATION_STATE_COMPLETED, and so on."""
    return word_of(types.MigrationState, state, "MIGRATION_STATE_")


def guest_state_word(state: int) -> str:
    """`running` for GUEST_STATE_RUNNING, and so on."""
    return word_of(types.GuestState, state, "GUEST_STATE_")


def guest_kind_word(kind: int) -> str:
    """`kvm` for GUEST_KIND_KVM, and so on."""
    return word_of(types.GuestKind, kind, "GUEST_KIND_")


def pages_present(pages: types.PageCounts) -> int:
    """Pages that the destination has, zero pages included."""
    return pages.zero + pages.precopy + pages.urgent + pages.background


def missing_pages(pages: types.PageCounts) -> int:
    """Pages that the destination lacks."""
    return pages.total - pages_present(pages)
