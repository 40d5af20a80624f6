"""A report of one or more traces: one HTML page that loads nothing (docs/traces.md)."""

from migrate.telemetry.report.page import report_html

__all__ = ["report_html"]
