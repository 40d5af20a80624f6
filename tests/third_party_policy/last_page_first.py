"""A policy that a stranger could have written after ten minutes of docs/policies.md."""

from migrate.pager.policy import Policy

RUN_PAGES = 64


class Descending(Policy):
    """The last pages first, down to the first."""

    def __init__(self, context):
        super().__init__(context)
        self._runs = iter(range((context.pages - 1) // RUN_PAGES * RUN_PAGES, -1, -RUN_PAGES))

    def next_runs(self, missing):
        return ((first_page, RUN_PAGES) for first_page in self._runs)
