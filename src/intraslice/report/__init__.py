"""The HTML report of a comparison: one page that needs no network."""

from intraslice.report.page import PAGE_BEGINS, render_report

__all__ = ["PAGE_BEGINS", "render_report"]
