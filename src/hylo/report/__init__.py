"""The report of a run: report.json, one self-contained report.html, and its figures as PNG files."""

from hylo.report.report import read_metrics, write_report

__all__ = ["read_metrics", "write_report"]
