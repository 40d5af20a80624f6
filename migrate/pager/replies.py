"""Holds a page server to its word: replies come in request order, in ascending runs, without gaps, none unasked for."""

import threading
from collections import deque
from dataclasses import dataclass

from migrate.errors import RemoteProtocolError


@dataclass(slots=True)
class _Asked:
    request_id: int
    next_page: int
    end_page: int


class ReplyOrder:
    """The requests of one stream that are not fully answered, oldest first. Thread-safe."""

    def __init__(self) -> None:
        self._asked: deque[_Asked] = deque()
        self._next_request_id = 1
        self._lock = threading.Lock()

    def ask(self, first_page: int, count_pages: int) -> int:
        """Note a request that is about to be sent; return its id."""
        with self._lock:
            request_id = self._next_request_id
            self._next_request_id += 1
            self._asked.append(_Asked(request_id, first_page, first_page + count_pages))
            return request_id

    def answer(self, request_id: int, first_page: int, count_pages: int, *, is_zero: bool) -> bool:
        """Check a reply against what was asked for; return whether it completes its request.

        Raises:
            RemoteProtocolError: nobody asked for it, or not now.
        """
        with self._lock:
            if not self._asked:
                raise RemoteProtocolError(f"reply {request_id} came, but no request is open")
            asked = self._asked[0]
            if request_id != asked.request_id:
                raise RemoteProtocolError(f"reply {request_id} came where request {asked.request_id} is the oldest")
            if first_page != asked.next_page or count_pages < 1:
                raise RemoteProtocolError(
                    f"reply {request_id} has {count_pages} pages from {first_page}, expected {asked.next_page}"
                )
            end_page = first_page + count_pages
            if end_page > asked.end_page and not is_zero:
                raise RemoteProtocolError(f"reply {request_id} has data up to page {end_page}, asked {asked.end_page}")
            if end_page < asked.end_page:
                asked.next_page = end_page
                return False
            self._asked.popleft()
            return True

    @property
    def open_requests(self) -> int:
        """How many requests wait for an answer or the rest of it."""
        with self._lock:
            return len(self._asked)
