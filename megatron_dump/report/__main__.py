"""`python -m megatron_dump.report RUN_DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dump import report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m megatron_dump.report", description=report.__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's explicit_log_dir")
    try:
        print(*report.write_report(parser.parse_args().run_dir), sep="\n")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"no report: {error}") from error
