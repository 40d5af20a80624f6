"""Builds the C extension and the preload library; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    cffi_modules=["migrate/native/build.py:ffibuilder"],
    ext_modules=[
        # No Python module, but built, installed and found like one: migrate/native/preload.py knows where.
        Extension(
            "migrate.native._native_preload",
            ["migrate/native/preload/mmap_hook.c"],
            extra_compile_args=["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-fvisibility=hidden", "-Wextra", "-Werror"],
        )
    ],
)
