"""Fetches pages with stock grpcio: an urgent stream and a background stream, each on a TCP connection of its own.

Threads, for each stream: one of grpcio's that pulls requests from our generator, and one of ours that takes replies and
places them. The generators wait in C, with the GIL dropped; nothing here touches guest RAM.

This is the reference that the native transport is tested against, and measured against.
"""

import threading
import time
from collections.abc import Callable, Iterator

import grpc

from migrate.channels import keepalive_options, open_channel
from migrate.config import BACKGROUND_RUN_PAGES, BACKGROUND_RUNS_IN_FLIGHT, CONNECT_DEADLINE_S, Endpoint
from migrate.errors import ChannelError, MigrateError, RemoteProtocolError
from migrate.native.exports import BEARER, METADATA_AUTHORIZATION, METADATA_MIGRATION_ID
from migrate.native.fetcher import PEER_TIMEOUT_US
from migrate.native.pager import PageKind, Pager, PagerStoppedError
from migrate.native.replies import ReplyOrder
from migrate.pager.pacing import Pacer
from migrate.telemetry.clock import Clock
from migrate.units import pages_to_bytes
from migrate.v1 import page_service_pb2 as pb
from migrate.v1 import page_service_pb2_grpc as rpc

_CLAIM_TIMEOUT_US = 250_000
_CHANNEL_OPTIONS = (
    # Without this, channels to one address share one TCP connection, and faults queue behind the background.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 4 << 20),
)


class GrpcioFetcher:
    """The page call of one incoming migration, with stock grpcio.

    Args:
        endpoint: The source's PageService.
        migration_id: Names the migration to the source.
        token: Proves that we are its destination.
        verify: Every data run must carry its digest.
        max_bandwidth_bytes_per_s: Cap of the background; 0 is none.
        peer_timeout_us: Within so long the loss of the source is known; 0 is PEER_TIMEOUT_US.
        clock: Times the pacing.
        on_failure: Told, once, the error that ended a stream before every page was placed.
        credentials: For TLS; None connects in plaintext.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        migration_id: str,
        token: str,
        *,
        verify: bool,
        max_bandwidth_bytes_per_s: int,
        peer_timeout_us: int = 0,
        clock: Clock,
        on_failure: Callable[[MigrateError], None],
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._metadata = ((METADATA_MIGRATION_ID, migration_id), (METADATA_AUTHORIZATION, BEARER + token))
        self._verify = verify
        self._clock = clock
        self._pacer = Pacer(max_bandwidth_bytes_per_s, clock)
        self._on_failure = on_failure
        peer_timeout_us = peer_timeout_us or PEER_TIMEOUT_US
        self._connect_timeout_us = min(int(CONNECT_DEADLINE_S * 1_000_000), peer_timeout_us)
        # The background's answers may stand behind all that it has in flight.
        self._channels = [
            open_channel(
                str(endpoint),
                credentials,
                (*_CHANNEL_OPTIONS, *keepalive_options(max(1, peer_timeout_us // 2000), max(1, answer_us // 1000))),
            )
            for answer_us in (peer_timeout_us // 2, peer_timeout_us * 2)
        ]
        self._threads: list[threading.Thread] = []
        self._calls: list[grpc.Call] = []
        self._stopping = threading.Event()
        self._woken = threading.Event()
        # Held while pages are claimed: once we are stopping, nobody claims any more.
        self._claiming_urgent, self._claiming_run = threading.Lock(), threading.Lock()
        self._lock = threading.Lock()
        self._failed = False
        self._wire_bytes = 0

    def connect(self) -> None:
        """Open both connections.

        Raises:
            ChannelError: the source's page service cannot be reached.
        """
        deadline_us = self._clock.now_us() + self._connect_timeout_us
        for channel in self._channels:
            try:
                left_us = max(0, deadline_us - self._clock.now_us())
                grpc.channel_ready_future(channel).result(timeout=left_us / 1_000_000)
            except grpc.FutureTimeoutError:
                raise ChannelError(
                    f"the destination cannot reach the source's page service at {self._endpoint}",
                    remedy="give the source daemon a --page-listen address that the destination can connect to",
                ) from None

    def start(self, pager: Pager) -> None:
        """Begin to fetch all that the pager misses."""
        pager.start_fault_thread()
        window = threading.Semaphore(BACKGROUND_RUNS_IN_FLIGHT)
        urgent, background = ReplyOrder(), ReplyOrder()
        self._spawn("urgent", PageKind.URGENT, pager, urgent, self._urgent_requests(pager, urgent), None)
        self._spawn(
            "background",
            PageKind.BACKGROUND,
            pager,
            background,
            self._background_requests(pager, background, window),
            window,
        )

    @property
    def wire_bytes(self) -> int:
        """Message bytes so far, requests and replies of both streams."""
        with self._lock:
            return self._wire_bytes

    def wake(self) -> None:
        """Look at the pager again: there may be something to ask for, or nothing any more."""
        self._woken.set()

    def join(self) -> None:
        """Wait until both streams have ended by themselves, as they do once the pager is complete."""
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Cancel what still runs, close both connections. The pager may be closed, or told to ask again, after this."""
        self._stopping.set()
        self._woken.set()
        with self._claiming_urgent, self._claiming_run:
            pass
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()
        self.join()
        for channel in self._channels:
            channel.close()

    def _spawn(
        self,
        name: str,
        kind: PageKind,
        pager: Pager,
        order: ReplyOrder,
        requests: Iterator[pb.FetchPagesRequest],
        window: threading.Semaphore | None,
    ) -> None:
        channel = self._channels[len(self._threads)]
        call = rpc.PageServiceStub(channel).FetchPages(requests, metadata=self._metadata)
        with self._lock:
            self._calls.append(call)
        thread = threading.Thread(
            target=self._take_replies, name=f"fetch-{name}", args=(kind, pager, order, call, window), daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _urgent_requests(self, pager: Pager, order: ReplyOrder) -> Iterator[pb.FetchPagesRequest]:
        try:
            while (pages := self._claim_urgent(pager)) is not None:
                if pages:  # when gRPC writes them is for it to know
                    pager.note_sent(time.monotonic_ns())
                for page in pages:
                    yield self._request(order, page, 1)
        except PagerStoppedError:
            return
        except MigrateError as error:
            self._fail(error)

    def _claim_urgent(self, pager: Pager) -> list[int] | None:
        """Pages to ask for, none after a while; None once we are stopping."""
        with self._claiming_urgent:
            return None if self._stopping.is_set() else pager.claim_urgent(_CLAIM_TIMEOUT_US)

    def _background_requests(
        self, pager: Pager, order: ReplyOrder, window: threading.Semaphore
    ) -> Iterator[pb.FetchPagesRequest]:
        while not self._stopping.is_set():
            if not window.acquire(timeout=1):
                continue
            with self._claiming_run:
                if self._stopping.is_set():
                    return
                self._woken.clear()
                run = pager.claim_run(BACKGROUND_RUN_PAGES)
                if run is None and pager.is_complete:
                    return
            if run is None:
                window.release()
                self._woken.wait(pager.held_s or 1)  # every reply, suggestion and invalidation ends it
                continue
            first_page, count_pages = run
            if self._stopping.wait(self._pacer.delay_s(pages_to_bytes(count_pages))):
                return
            yield self._request(order, first_page, count_pages)

    def _request(self, order: ReplyOrder, first_page: int, count_pages: int) -> pb.FetchPagesRequest:
        request_id = order.ask(first_page, count_pages)
        request = pb.FetchPagesRequest(request_id=request_id, first_page=first_page, page_count=count_pages)
        with self._lock:
            self._wire_bytes += request.ByteSize()
        return request

    def _take_replies(
        self,
        kind: PageKind,
        pager: Pager,
        order: ReplyOrder,
        call: "grpc._CallIterator[pb.FetchPagesResponse]",
        window: threading.Semaphore | None,
    ) -> None:
        try:
            for response in call:
                if self._place(kind, pager, order, response) and window is not None:
                    window.release()
            if order.open_requests:
                raise RemoteProtocolError(f"the source ended the {kind.name.lower()} stream with requests unanswered")
        except grpc.RpcError as error:  # the call itself, which knows its status
            if not self._stopping.is_set():
                reason = f"{error.code().name}: {error.details()}"
                self._fail(ChannelError(f"the page call to the source at {self._endpoint} broke: {reason}"))
        except MigrateError as error:
            call.cancel()
            self._fail(error)

    def _place(self, kind: PageKind, pager: Pager, order: ReplyOrder, response: pb.FetchPagesResponse) -> bool:
        with self._lock:
            self._wire_bytes += response.ByteSize()
        content = response.WhichOneof("content")
        if content is None:
            raise RemoteProtocolError("the source sent a reply without content")
        if content == "compressed":
            raise RemoteProtocolError("the source sent a compressed run, but no compression was agreed on")
        first_page, count_pages = response.first_page, response.page_count
        is_zero = content == "zero"
        is_complete = order.answer(response.request_id, first_page, count_pages, is_zero=is_zero)
        if response.read_ns:
            pager.note_read(first_page, count_pages, response.read_ns)
        if is_zero:
            # A hole is told as far as it goes, perhaps to the end of a larger file than our region.
            pager.place_zero(first_page, min(count_pages, pager.pages - first_page), response.generation)
        else:
            digest = response.digest if self._verify else None
            pager.place_data(first_page, count_pages, response.data, kind, digest, response.generation)
        self._woken.set()
        return is_complete

    def _fail(self, error: MigrateError) -> None:
        with self._lock:
            first, self._failed = not self._failed, True
        if first and not self._stopping.is_set():
            self._on_failure(error)
