"""Runs over one another: means and confidence bands over seeds, over steps and over generated tokens, and tables.

    python tools/compare_runs.py results/dump_ucb-* results/uniform-*
    python tools/compare_runs.py --group DUMP results/dump_ucb-* --group uniform results/uniform-* --out results/compare

Runs whose config.yaml differs in model.seed alone (log folder and layout aside) are one group; --group names one.
"""

from __future__ import annotations

import argparse
import html
import io
import os
import sys
from pathlib import Path

import matplotlib
from run_comparison.figure import draw_groups
from run_comparison.groups import Group, read_groups
from run_comparison.intervals import CONFIDENCE
from run_comparison.tables import as_text, between_groups, by_group, by_source

from megatron_dump.report.markup import CSS, data_url, table
from megatron_dump.report.style import STYLE

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><link rel="icon" href="data:,"><style>{css}</style>
<h1>{title}</h1><p class="quiet">± and bands: {confidence:.0%} intervals of the mean over seeds (Student's t). At equal
tokens, values between two validations are interpolated.</p>{tables}<img alt="curves of the groups" src="{picture}">
{sources}<h2>Runs</h2>{runs}</html>
"""


def write_comparison(groups: list[Group], out: Path) -> tuple[Path, Path]:
    """`out`.html and `out`.png, each at once; returns their paths."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        draw_groups(groups).savefig(buffer, format="png", dpi=130)
    tables = table(*by_group(groups)) + ("<p></p>" + table(*between_groups(groups)) if len(groups) > 1 else "")
    tested = by_source(groups)
    runs = [[group.label, seed.run.name, str(seed.seed)] for group in groups for seed in group.seeds]
    page = PAGE.format(
        title=html.escape(" against ".join(group.label for group in groups)),
        css=CSS,
        confidence=CONFIDENCE,
        tables=tables,
        picture=data_url(buffer.getvalue()),
        sources=f"<h2>Test accuracy by source, last validation</h2>{table(*tested)}" if tested[1] else "",
        runs=table(("group", "run", "seed"), runs, "text"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".png", buffer.getvalue()), (".html", page.encode())):
        unfinished = out.with_name(f".{out.name}{suffix}")
        unfinished.write_bytes(content)
        os.replace(unfinished, out.with_name(out.name + suffix))
    return out.with_name(f"{out.name}.html"), out.with_name(f"{out.name}.png")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="explicit_log_dir of a run")
    parser.add_argument("--group", nargs="+", action="append", default=[], metavar=("LABEL", "RUN"))
    parser.add_argument("--out", type=Path, default=Path("compare"), help="OUT.html and OUT.png (default: compare)")
    args = parser.parse_args(argv)
    if not args.runs and not args.group:
        parser.error("name at least one run")
    try:
        if bare := next((label for label, *runs in args.group if not runs), None):
            raise ValueError(f"--group {bare}: a label and its runs, as in --group DUMP results/dump_ucb-1")
        groups = read_groups(args.runs, [(label, [Path(run) for run in runs]) for label, *runs in args.group])
        paths = write_comparison(groups, args.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(as_text(by_group(groups)))
    if len(groups) > 1:
        print("", as_text(between_groups(groups)), sep="\n")
    print(f"\n± {CONFIDENCE:.0%} intervals over seeds", *paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
