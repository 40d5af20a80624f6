"""What needs the extra `trace`: imported where it is used, for it takes a while to load and need not be installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from migrate.config import RECORDED_PAGES_MAX
from migrate.errors import TraceError


@contextmanager
def imports_extra() -> Iterator[None]:
    """A scope that imports such a module.

    Raises:
        TraceError: a module that it needs is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise TraceError(
            f"traces need a Python module that is not here: {error.name}", remedy="pip install 'migrate[trace]'"
        ) from error


def recorded_pages(path: Path) -> list[int]:
    """The pages of a trace's faults, each once, in their order; as many as can be handed over.

    Raises:
        TraceError: it is no trace.
    """
    with imports_extra():
        from migrate.pager.replay import first_touches  # noqa: PLC0415
        from migrate.telemetry.trace_file import read_trace  # noqa: PLC0415
    return first_touches(read_trace(path))[:RECORDED_PAGES_MAX]
