"""Pairs of daemons that are made while the test before runs: each test has new ones, and does not wait for them."""

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.harness.recoverable import recoverable_pair


class Spares:
    """At most one pair more than there are tests under way.

    Args:
        make_directory: Makes a directory for a pair.
    """

    def __init__(self, make_directory):
        self._make_directory = make_directory
        self._pool = ThreadPoolExecutor(1, "spare-pair")
        # What it is made with, and the promise of it, with the stack that ends it.
        self._spare = None

    @contextlib.contextmanager
    def pair(self, request, **options):
        """A pair for the test that requests a fixture; another one is begun if the test after it will want it."""
        spare, self._spare = self._spare, None
        if spare is None or spare[0] != options:
            self._drop(spare)
            spare = self._begin(options)
        stack, made = spare[1].result()
        try:
            with stack:
                if _is_wanted_next(request):
                    self._spare = self._begin(options)
                    # A test that is to be alone has no daemons starting beside it, either.
                    if request.node.get_closest_marker("alone"):
                        self._spare[1].exception()
                yield made
        finally:
            # With pytest's own stderr, it would be said in the test before, or in none.
            for daemon in (made.source, made.destination):
                sys.stderr.write(daemon.log.read_text(errors="replace"))

    def close(self):
        self._drop(self._spare)
        self._pool.shutdown()

    def _begin(self, options):
        return options, self._pool.submit(self._make, options)

    def _make(self, options):
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(recoverable_pair(self._make_directory(), keep_logs=True, **options))
            return stack.pop_all(), made

    def _drop(self, spare):
        if spare is not None:
            spare[1].result()[0].close()


def _is_wanted_next(request):
    items = request.session.items
    following = items[items.index(request.node) + 1 :][:1]
    return any(item.path == request.path and request.fixturename in item.fixturenames for item in following)
