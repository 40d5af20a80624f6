"""How runs of pages may be compressed on the wire."""

from enum import IntEnum

from migrate.native._native import lib


class Compression(IntEnum):
    """What a reader of pages understands beside plain ones. The values are those of migrate.v1.PageCompression."""

    NONE = lib.MIG_COMPRESSION_NONE
    ZSTD = lib.MIG_COMPRESSION_ZSTD
