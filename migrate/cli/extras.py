"""What needs the extra `trace`: imported where it is used, for it takes a while to load and need not be installed."""

from pathlib import Path

from migrate.config import RECORDED_PAGES_MAX
from migrate.errors import TraceError


def extra_is_missing(error: ModuleNotFoundError) -> TraceError:
    """What traces need beside the rest is not installed."""
    return TraceError(
        f"traces need a Python module that is not here: {error.name}", remedy="pip install 'migrate[trace]'"
    )


def recorded_pages(path: Path) -> list[int]:
    """The pages of a trace's faults, each once, in their order; as many as can be handed over.

    Raises:
        TraceError: it is no trace.
    """
    try:
        from migrate.telemetry.trace_file import read_trace  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise extra_is_missing(error) from error
    return list(dict.fromkeys(read_trace(path).faults.page.tolist()))[:RECORDED_PAGES_MAX]
