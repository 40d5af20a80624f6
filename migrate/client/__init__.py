"""The Python API: what an operator can ask of a daemon, from a program; the command line is made of it.

`Client` blocks, `AsyncClient` is for asyncio; both have the same methods. Answers are the messages of migrate.v1, whose
fields carry their units in their names. Everything that fails raises a class of migrate.errors.
docs/python.md has an example.
"""

from migrate.client.aio import AsyncClient, AsyncGuests, AsyncMigrations
from migrate.client.sync import Client, Guests, Migrations
from migrate.client.terms import GuestTerms, MigrationTerms
from migrate.client.words import (
    FINAL_STATES,
    SETTLED_STATES,
    guest_kind_word,
    guest_state_word,
    missing_pages,
    pages_present,
    state_word,
)

__all__ = [
    "FINAL_STATES",
    "SETTLED_STATES",
    "AsyncClient",
    "AsyncGuests",
    "AsyncMigrations",
    "Client",
    "GuestTerms",
    "Guests",
    "MigrationTerms",
    "Migrations",
    "guest_kind_word",
    "guest_state_word",
    "missing_pages",
    "pages_present",
    "state_word",
]
