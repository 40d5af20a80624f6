"""The page call of the model: a Fetcher whose every request, read and reply is a step of the model's.

Pages are read as migrate.pageserver.servicer reads them, and placed as migrate.pager.grpcio_fetcher places them.
"""

from dataclasses import dataclass, field

from migrate.errors import ChannelError, NotFoundError
from migrate.native.exports import BEARER
from migrate.native.page_source import RunBuffer
from migrate.native.pager import PageKind, PagerStoppedError
from tests.harness.model_world import GATE_S

REQUEST_PAGES_MAX = 32
_CLAIM_US = 0


@dataclass
class Request:
    """One request, later with its reply.

    Attributes:
        generation: Once the source has begun to read.
        runs: Once it has read.
    """

    first_page: int
    count_pages: int
    kind: PageKind
    generation: int | None = None
    runs: list | None = field(default=None, repr=False)


class ModelLink:
    """See migrate.pager.fetcher.Fetcher.

    Args:
        world: Shared state.
        exports: The source's.
        terms: What is fetched.
        on_failure: Told that pages stop coming.
    """

    def __init__(self, world, exports, terms, on_failure, *, fails_to_connect=False):
        self._world = world
        self._exports = exports
        self._terms = terms
        self._on_failure = on_failure
        self._fails_to_connect = fails_to_connect
        self.in_flight = []
        self.pager = None  # under `changed` whenever it is used: the session closes it after us
        self.is_joining = False
        self.is_closed = False
        self.has_failed = False
        self._wire_bytes = 0

    # ---- Fetcher ----

    def connect(self):
        if self._fails_to_connect:
            raise ChannelError("the page service of the model cannot be reached")

    def start(self, pager):
        with self._world.changed:
            self._check_open("start")
            assert self.pager is None
            self.pager = pager
        pager.start_fault_thread()

    def wake(self):
        self._check_open("wake")

    def join(self):
        with self._world.changed:
            self.is_joining = True
            self._world.changed.notify_all()
            if not self._world.changed.wait_for(lambda: not self.is_draining, GATE_S):
                self._world.violate("join never ended")

    def close(self):
        with self._world.changed:
            self.is_closed = True
            self.pager = None
            self.in_flight.clear()
            self._world.changed.notify_all()

    @property
    def wire_bytes(self):
        self._check_open("wire_bytes")
        return self._wire_bytes

    def _check_open(self, what):
        if self.is_closed:
            self._world.violate(f"the session called {what} of a fetcher that it had closed")

    # ---- steps ----

    @property
    def is_active(self):
        """Whether pages can move."""
        return self.pager is not None and not self.has_failed

    @property
    def is_draining(self):
        """Whether calls that have nothing more to ask wait for their last replies."""
        return self.is_active and bool(self.in_flight)

    def counters(self):
        with self._world.changed:
            return self.pager.counters() if self.pager is not None else None

    def is_missing(self, page):
        """Whether the pager waits for the page."""
        with self._world.changed:
            return bool(self.pager.copy_map()[page // 8] >> page % 8 & 1)

    def ask_background(self, max_pages):
        with self._world.changed:
            run = self.pager.claim_run(max_pages) if self.is_active else None
            if run is not None:
                self.in_flight.append(Request(*run, PageKind.BACKGROUND))
            return run is not None

    def ask_urgent(self):
        with self._world.changed:
            if not self.is_active:
                return
            try:
                pages = self.pager.claim_urgent(_CLAIM_US)
            except PagerStoppedError:
                return
            self.in_flight += [Request(page, 1, PageKind.URGENT) for page in pages]

    def label(self, request):
        """The source begins to answer: the generation is looked at before the bytes."""
        export = self._find()
        if export is not None:
            request.generation = export.generation

    def read(self, request):
        """The source reads what it answers with."""
        if request.generation is None:
            self.label(request)
        export = self._find()
        if export is None:
            return
        try:
            with export.reading() as source:
                runs = list(source.read(request.first_page, request.count_pages, RunBuffer(request.count_pages)))
        except NotFoundError as error:
            self.fail(error.message)
            return
        request.runs = runs

    def deliver(self, request):
        """A reply arrives."""
        with self._world.changed:
            if not self.is_active or request not in self.in_flight:
                return
            self.in_flight.remove(request)
            for run in request.runs:
                self._place(request, run)
            self._world.changed.notify_all()

    def cut(self):
        """The connection breaks and is made again: what it owed is given back."""
        with self._world.changed:
            if not self.is_active:
                return
            for request in self.in_flight:
                self.pager.give_back(request.first_page, request.count_pages)
            self.in_flight.clear()
            self._world.changed.notify_all()

    def fail(self, words="the model wants it so"):
        """The page calls end for good; the session learns it from a thread of the fetcher's."""
        with self._world.changed:
            if not self.is_active:
                return
            self.has_failed = True
            self.in_flight.clear()
            self._world.changed.notify_all()
        self._world.spawn("fetch-watch", lambda: self._on_failure(ChannelError(f"the page call broke: {words}")))

    def _find(self):
        try:
            return self._exports.find(self._terms.migration_id, BEARER + self._terms.token)
        except NotFoundError as error:
            self.fail(error.message)
            return None

    def _place(self, request, run):
        if run.data is None:
            count_pages = min(run.count_pages, self.pager.pages - run.first_page)
            self.pager.place_zero(run.first_page, count_pages, request.generation)
            return
        self._wire_bytes += len(run.data)
        digest = run.digest if self._terms.verify else None
        self.pager.place_data(run.first_page, run.count_pages, run.data, request.kind, digest, request.generation)
