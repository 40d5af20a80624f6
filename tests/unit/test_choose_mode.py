"""Which mode a guest is moved in, and which it cannot be moved in."""

import pytest

from migrate.errors import ConfigError
from migrate.session.rules import choose_mode
from migrate.v1 import types_pb2 as types

ANY, POSTCOPY = types.MIGRATION_MODE_UNSPECIFIED, types.MIGRATION_MODE_POSTCOPY
HYBRID, PRECOPY = types.MIGRATION_MODE_HYBRID, types.MIGRATION_MODE_PRECOPY


@pytest.mark.parametrize(
    ("asked", "has_dirty_log", "chosen"),
    [
        (ANY, True, HYBRID),
        (ANY, False, POSTCOPY),
        (POSTCOPY, True, POSTCOPY),
        (POSTCOPY, False, POSTCOPY),
        (HYBRID, True, HYBRID),
        (PRECOPY, True, PRECOPY),
    ],
)
def test_mode_goes_by_what_the_guest_can(asked, has_dirty_log, chosen):
    assert choose_mode(asked, has_dirty_log=has_dirty_log, reason="") == chosen


@pytest.mark.parametrize("asked", [HYBRID, PRECOPY])
def test_refusal_has_the_reason_of_the_guest(asked):
    with pytest.raises(ConfigError, match="no dirty scan here: Operation not supported") as refused:
        choose_mode(asked, has_dirty_log=False, reason="no dirty scan here: Operation not supported")
    assert "--mode postcopy" in refused.value.remedy
