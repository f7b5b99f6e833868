"""The report of a run, or of any results: report.json, one self-contained report.html, figures as PNG and SVG files."""

from hylo.report.report import read_metrics, report_of, write_report

__all__ = ["read_metrics", "report_of", "write_report"]
