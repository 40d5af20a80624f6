"""Describes the C extension `migrate.native._native` to cffi (API mode): every C file here, one cdef.h."""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]

ffibuilder = FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text())
ffibuilder.set_source_pkgconfig(
    "migrate.native._native",
    ["libnghttp2", "libssl", "libcrypto", "libzstd"],
    "".join(
        f'#include "{header.name}"\n'
        for header in sorted(HERE.glob("*.h"))
        if header.name != "cdef.h" and not header.stem.endswith("_internal")
    ),
    sources=[
        os.path.relpath(source, HERE.parent.parent) for source in sorted(HERE.glob("*.c")) if source.stem != "_native"
    ],
    include_dirs=[os.path.relpath(HERE, HERE.parent.parent)],
    depends=[os.path.relpath(header, HERE.parent.parent) for header in sorted(HERE.glob("*.h"))],
    extra_compile_args=["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-pthread", "-fvisibility=hidden", *WARNINGS],
    extra_link_args=["-pthread"],
)
