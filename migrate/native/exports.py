"""Which memories are served now, to whom: one registry for every page server of a daemon."""

import errno
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from migrate.errors import AlreadyExistsError, NativeError, NotFoundError, PermissionDeniedError
from migrate.native._native import ffi, lib
from migrate.native.compression import Compression

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migrate.native.page_source import PageSource

METADATA_MIGRATION_ID = "migration-id"
METADATA_AUTHORIZATION = "authorization"
BEARER = "Bearer "


class Exports:
    """All memories that this daemon serves. Thread-safe."""

    def __init__(self) -> None:
        ret = ffi.new("struct mig_exports **")
        _check("make a registry of memories", lib.mig_exports_create(ret))
        self.handle: Any = ffi.gc(ret[0], lib.mig_exports_destroy)
        self._sources: dict[str, PageSource] = {}
        self._lock = threading.Lock()

    def publish(
        self,
        migration_id: str,
        token: str,
        source: "PageSource",
        compression: Compression = Compression.NONE,
        peer_name: str = "",
        *,
        times_replies: bool = False,
    ) -> None:
        """Serve a memory to the holder of a token from now on.

        Args:
            migration_id: Names the memory to its reader.
            token: Proves that the reader is the one.
            source: The memory.
            compression: What the reader understands; a server may use it or not.
            peer_name: DNS name or numeric address that the reader's certificate must be for, where readers have one;
                empty is any host.
            times_replies: Whether each reply says how long it took.

        Raises:
            AlreadyExistsError: the migration is served already.
        """
        with self._lock:
            rc = lib.mig_exports_publish(
                self.handle,
                migration_id.encode(),
                token.encode(),
                source.handle,
                compression,
                peer_name.encode(),
                times_replies,
            )
            if rc == -errno.EEXIST:
                raise AlreadyExistsError(f"migration {migration_id!r} is served already")
            _check("publish a memory", rc)
            self._sources[migration_id] = source

    def set_generation(self, migration_id: str, generation: int) -> None:
        """What is read from now on was read in this generation of the dirty log.

        Raises:
            NotFoundError: the migration is not served.
        """
        if lib.mig_exports_set_generation(self.handle, migration_id.encode(), generation) < 0:
            raise NotFoundError(f"no pages are served here for migration {migration_id!r}")

    def withdraw(self, migration_id: str) -> None:
        """Serve a memory no longer. Returns once no reader is inside it, so that it may be freed. Idempotent."""
        lib.mig_exports_withdraw(self.handle, migration_id.encode())
        with self._lock:
            self._sources.pop(migration_id, None)

    def find(self, migration_id: str, authorization: str) -> "Export":
        """The export that a call may read, from its metadata.

        Raises:
            NotFoundError: no such migration serves pages now.
            PermissionDeniedError: the token is not the migration's.
        """
        ret = ffi.new("struct mig_export **")
        with self._lock:
            rc = lib.mig_exports_find(self.handle, migration_id.encode(), authorization.encode(), ret)
            source = self._sources.get(migration_id)
        if rc == -errno.EACCES:
            raise PermissionDeniedError("the token is not this migration's")
        if rc < 0 or source is None:
            raise NotFoundError(f"no pages are served here for migration {migration_id!r}")
        return Export(ret[0], source, self)


class Export:
    """One memory, as one call holds it. A context manager: what it holds is let go of at its end.

    Not at some later time, when nothing refers to us any more: a call that broke leaves an exception, whose frames do.

    Args:
        handle: The C object, whose reference we take over.
        source: The memory.
        exports: Kept alive as long as we are.
    """

    def __init__(self, handle: Any, source: "PageSource", exports: Exports) -> None:
        self._exports = exports
        self._handle = ffi.gc(handle, lib.mig_export_put)
        self._source = source

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        ffi.release(self._handle)

    @property
    def generation(self) -> int:
        """The generation of what is read from now on: to be asked before the read."""
        generation: int = lib.mig_export_generation(self._handle)
        return generation

    @property
    def times_replies(self) -> bool:
        """Whether replies say how long they took."""
        return bool(lib.mig_export_times_replies(self._handle))

    @property
    def peer_name(self) -> str:
        """The host that it is for, where readers prove who they are; empty is any."""
        return str(ffi.string(lib.mig_export_peer_name(self._handle)).decode())

    @contextmanager
    def reading(self) -> "Iterator[PageSource]":
        """A scope in which the memory is not freed.

        Raises:
            NotFoundError: it was withdrawn meanwhile.
        """
        if lib.mig_export_enter(self._handle) == ffi.NULL:
            raise NotFoundError("the migration's pages are no longer served")
        try:
            yield self._source
        finally:
            lib.mig_export_leave(self._handle)


def _check(operation: str, rc: int) -> None:
    if rc < 0:
        raise NativeError(operation, -rc)
