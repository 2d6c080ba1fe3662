"""Reports: run directories in, one HTML page out. Knows files only; no torch, no models."""

from eckart.reports.page import write_report

__all__ = ["write_report"]
