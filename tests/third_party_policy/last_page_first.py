"""A policy for a guest that works at the top of its memory."""

from migrate.pager.policy import Policy


class Descending(Policy):
    """The last pages first, down to the first."""

    def __init__(self, context):
        super().__init__(context)
        self._runs = ((page, 1) for page in range(context.pages - 1, -1, -1))

    def next_runs(self, missing):
        return self._runs
