"""Guests of kind process that are programs of somebody else's, which opted in (docs/embedding.md).

The guest process is their companion: it speaks the guest protocol, and a much smaller one with the program.
"""

from pathlib import Path


def c_dir() -> Path:
    """Where migrate_guest.h and migrate_guest.c are, for programs in C."""
    return Path(__file__).parent
