"""`python -m megatron_dump.report RUN_DIR… [--watch]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dump import report
from megatron_dump.report.watch import watch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m megatron_dump.report", description=report.__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="the run's explicit_log_dir")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="keep the report of one run up to date; the open page refreshes itself (default: every 10)",
    )
    args = parser.parse_args()
    if args.watch is not None and (len(args.run_dir) > 1 or args.watch <= 0):
        parser.error("--watch takes one RUN_DIR, and SECONDS above 0")
    try:
        for run_dir in args.run_dir:
            if args.watch is not None:
                watch(run_dir, args.watch)
            else:
                print(*report.write_report(run_dir), sep="\n")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"no report: {error}") from error
