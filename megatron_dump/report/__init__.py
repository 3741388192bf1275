"""report.html and report.png of a run, from the files in its folder: `python -m megatron_dump.report RUN_DIR`."""

from megatron_dump.report.page import write_report

__all__ = ["write_report"]
