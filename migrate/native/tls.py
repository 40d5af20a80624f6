"""Whom the page call trusts, and as whom it speaks: mutual TLS 1.3 between hosts, for both of its ends."""

from pathlib import Path
from typing import Any

from migrate.errors import ConfigError
from migrate.native._native import ffi, lib


class NativeTls:
    """Our certificate and whose word counts. Servers and fetches that have it keep it, whatever becomes of this object.

    Args:
        ca: PEM file of the authorities.
        cert: PEM file of our certificate, and after it those between it and an authority.
        key: PEM file of its key, without a passphrase.
        peers: If that directory is there, only peers whose certificate is in one of its *.pem files are trusted.

    Raises:
        ConfigError: a file is missing or bad; it says which one, and why.
    """

    def __init__(self, ca: Path, cert: Path, key: Path, peers: Path | None = None) -> None:
        ret = ffi.new("struct mig_tls **")
        text = ffi.new("char[]", lib.MIG_TLS_TEXT_BYTES)
        peers_dir = ffi.NULL if peers is None else bytes(peers)
        rc = lib.mig_tls_create(bytes(ca), bytes(cert), bytes(key), peers_dir, ret, text, len(text))
        _check(rc, text)
        self._handle: Any = ret[0]

    @property
    def handle(self) -> Any:
        """The C object.

        Raises:
            ConfigError: it was let go of; to use nothing in its place would be plain text.
        """
        if self._handle == ffi.NULL:
            raise ConfigError("these TLS certificates were closed already")
        return self._handle

    def reload(self) -> None:
        """Load the files again: connections that there are end soon if their peer is not trusted any more.

        Raises:
            ConfigError: a file is missing or bad; then all stays as it was.
        """
        text = ffi.new("char[]", lib.MIG_TLS_TEXT_BYTES)
        _check(lib.mig_tls_reload(self.handle, text, len(text)), text)

    def close(self) -> None:
        """Let go of it. Idempotent."""
        lib.mig_tls_put(self._handle)
        self._handle = ffi.NULL


def _check(rc: int, text: Any) -> None:
    if rc < 0:
        raise ConfigError(ffi.string(text).decode(errors="replace"))
