"""Runs in zstd: by our own C, and frames written by hand (RFC 8878), which keep no rule unless told to."""

import struct

from migrate.native._native import ffi, lib

PAGE = 4096
MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGIC = b"\x50\x2a\x4d\x18"
BLOCK_BYTES_MAX = 1 << 17
_RAW, _RLE = 0, 1


class BadRunError(Exception):
    """Our C refused to decompress; the words are its own."""


def compressed(pages):
    """A run as one frame; None if it does not shrink enough, and is then as it was."""
    compressor = ffi.new("struct mig_compressor **")
    assert lib.mig_compressor_create(compressor) == 0
    buffer = ffi.new("uint8_t[]", pages)
    try:
        count_bytes = lib.mig_compress_run(compressor[0], buffer, len(pages) // PAGE)
    finally:
        lib.mig_compressor_destroy(compressor[0])
    if not count_bytes:
        assert ffi.buffer(buffer, len(pages))[:] == pages
        return None
    return ffi.buffer(buffer, count_bytes)[:]


class Decompressor:
    """One of our C's, for several runs."""

    def __init__(self):
        ret = ffi.new("struct mig_decompressor **")
        assert lib.mig_decompressor_create(ret) == 0
        self._handle = ffi.gc(ret[0], lib.mig_decompressor_destroy)

    def run(self, data, page_count, pointer=None):
        """The pages of a run.

        Args:
            data: The frame.
            page_count: How many pages it should hold.
            pointer: Where the frame lies, if that matters.

        Raises:
            BadRunError: it does not hold them.
        """
        pages = ffi.new("uint8_t **")
        rc = lib.mig_decompress_run(self._handle, pointer or ffi.from_buffer(data), len(data), page_count, pages)
        if rc < 0:
            raise BadRunError(ffi.string(lib.mig_decompressor_flaw(self._handle)).decode())
        assert int(ffi.cast("uintptr_t", pages[0])) % PAGE == 0
        return ffi.buffer(pages[0], page_count * PAGE)[:]


def decompressed(data, page_count):
    """The pages of a run, by a decompressor of its own."""
    return Decompressor().run(data, page_count)


# ---- by hand ----


def frame(*blocks, claims_bytes=None):
    """A frame of blocks, the last of which must say so.

    Args:
        blocks: Made by raw and rle.
        claims_bytes: What the header says that the frame holds; None if it does not say.
    """
    if claims_bytes is None:
        return MAGIC + b"\x00\x58" + b"".join(blocks)  # a window of 2 MiB
    return MAGIC + b"\xe0" + struct.pack("<Q", claims_bytes) + b"".join(blocks)


def raw(data, *, last=True):
    """A block of bytes as they are."""
    return _block_header(_RAW, len(data), last) + data


def rle(byte, count_bytes, *, last=True):
    """A block of one byte many times over: the densest there is."""
    return _block_header(_RLE, count_bytes, last) + byte


def _block_header(kind, count_bytes, last):
    return (last | kind << 1 | count_bytes << 3).to_bytes(3, "little")
