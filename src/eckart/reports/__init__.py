"""Reports: run directories in; one HTML page, and tables and figures as files, out. Knows files only, no models."""

from eckart.reports.drawings import why_no_drawings
from eckart.reports.files import write_files
from eckart.reports.page import write_report
from eckart.reports.runs import read_runs

__all__ = ["read_runs", "why_no_drawings", "write_files", "write_report"]
