"""The source's side of the page call: reads runs of pages out of a guest's memfd."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from migrate.errors import ConfigError, NativeError
from migrate.native._native import ffi, lib
from migrate.units import pages_to_bytes


@dataclass(frozen=True, slots=True)
class Run:
    """A run of pages that are all data, or (data is None) all zero."""

    first_page: int
    count_pages: int
    data: bytes | None
    digest: int


class PageSource:
    """Pages of one memfd, which stays the caller's.

    Reading is safe from several threads; `close` is for one alone.
    """

    def __init__(self, memfd: int, pages: int) -> None:
        ret = ffi.new("struct mig_page_source **")
        rc = lib.mig_page_source_create(memfd, pages, ret)
        if rc < 0:
            raise NativeError("map the guest's memfd", -rc)
        self._source = ret[0]
        self.pages = pages

    @property
    def handle(self) -> Any:
        """The C object, for other facades."""
        return self._source

    def digest_replies(self) -> None:
        """Serve a digest with every run of data, of the bytes that are sent: the guest may run. Before any read."""
        lib.mig_page_source_digest_replies(self._source)

    def take_digests(self) -> int:
        """Take the digest of every page now, serve these from then on, return their sum: the memory's digest.

        Raises:
            NativeError: the memfd could not be read.
        """
        ret = ffi.new("uint64_t *")
        rc = lib.mig_page_source_take_digests(self._source, ret)
        if rc < 0:
            raise NativeError("read the guest's memory for its digests", -rc)
        memory_digest: int = ret[0]
        return memory_digest

    def read(self, first_page: int, count_pages: int, buffer: "RunBuffer") -> Iterator[Run]:
        """Read pages as data and zero runs, ascending, without gaps; the last may be a hole that goes on beyond.

        Raises:
            ConfigError: the request does not lie within the source, or is larger than the buffer.
            NativeError: the memfd could not be read.
        """
        if not (0 < count_pages <= buffer.pages_max and 0 <= first_page <= self.pages - count_pages):
            raise ConfigError(
                f"{count_pages} pages from page {first_page} are not a request of 1 to {buffer.pages_max} pages"
                f" within the guest's {self.pages}"
            )
        found = lib.mig_page_source_read(self._source, first_page, count_pages, buffer.data, buffer.runs)
        if found < 0:
            raise NativeError("read the guest's memory", -found)
        for index in range(found):
            run = buffer.runs[index]
            data = None
            if not run.is_zero:
                start = buffer.data + pages_to_bytes(run.first_page - first_page)
                data = bytes(ffi.buffer(start, pages_to_bytes(run.count_pages)))
            yield Run(run.first_page, run.count_pages, data, run.digest)

    def close(self) -> None:
        """Free the mapping. The memfd stays open."""
        lib.mig_page_source_destroy(self._source)
        self._source = ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RunBuffer:
    """Room for one reader's largest request."""

    def __init__(self, pages_max: int) -> None:
        self.pages_max = pages_max
        self.data: Any = ffi.new("char[]", pages_to_bytes(pages_max))
        self.runs: Any = ffi.new("struct mig_run[]", pages_max)
