"""Holds a page server to its word: replies come in request order, in ascending runs, without gaps, none unasked for."""

import threading
from typing import Any

from migrate.errors import RemoteProtocolError
from migrate.native._native import ffi, lib


class ReplyOrder:
    """The requests of one stream that are not fully answered, oldest first. Thread-safe."""

    def __init__(self) -> None:
        self._order: Any = ffi.gc(ffi.new("struct mig_reply_order *"), lib.mig_reply_order_deinit)
        self._done = ffi.new("struct mig_asked *")
        self._lock = threading.Lock()

    def ask(self, first_page: int, count_pages: int) -> int:
        """Note a request that is about to be sent; return its id."""
        with self._lock:
            request_id: int = lib.mig_reply_order_ask(self._order, first_page, count_pages, 0)
        if not request_id:
            raise MemoryError
        return request_id

    def answer(self, request_id: int, first_page: int, count_pages: int, *, is_zero: bool) -> bool:
        """Check a reply against what was asked for; return whether it completes its request.

        Raises:
            RemoteProtocolError: nobody asked for it, or not now.
        """
        with self._lock:
            rc = lib.mig_reply_order_answer(self._order, request_id, first_page, count_pages, is_zero, self._done)
            if rc < 0:
                raise RemoteProtocolError(ffi.string(self._order.flaw).decode())
        return bool(rc)

    @property
    def open_requests(self) -> int:
        """How many requests wait for an answer or the rest of it."""
        with self._lock:
            count: int = self._order.count
        return count
