"""The HTML report of a comparison: one page that needs no network."""

from intraslice.report.page import render_report

__all__ = ["render_report"]
