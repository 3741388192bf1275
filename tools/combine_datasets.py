"""Combine parquet and JSONL files into one training and one test parquet file, whose columns the trainer reads.

    python tools/combine_datasets.py --out data/mix \\
        --input data/kk/train.parquet --input data/kk/test.parquet \\
        --input gsm8k.jsonl source=gsm8k prompt=question answer=answer answer_after='####' split=0.1 \\
        --limit 'kk_logic_*' train=900 test=100 \\
        --tokenizer examples/models/kk-tiny --max-prompt-length 512 --reward 'kk_*=kk'

The published combined data set from its puzzles (100 of each size to test, the other 900 to training):

    python tools/combine_datasets.py --out data/combined --input 'kk/people*_num1000.jsonl' split=100

Files are read twice: everything is checked before anything is written. A prompt that occurs twice (compared without
case, white space and compatibility forms) is taken once; if one of the two is a test row, that one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset_mix.inputs import FORMATS, Input, parse_input
from dataset_mix.lengths import characters, in_tokens
from dataset_mix.mix import Judge, Scan, scan, write
from dataset_mix.plan import SPLITS, Rules, make_plan
from dataset_mix.report import by_source, duplicates, file_table, source_table, taken_by_split
from rich.console import Console

from kk.files import count_rows, writing_text
from kk.progress import bar


class Arguments(argparse.ArgumentParser):
    """With @FILE: words of a file, quoted as in a shell, with # comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Arguments(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="append",
        required=True,
        metavar=("PATH", "key=value"),
        help="a file or a pattern of files, then its options: source, source_column, prompt, answer, answer_after, "
        "split (train, test, file, a share, or a number of test rows of each source), system, instruction, ability, "
        f"format ({', '.join(FORMATS)}); tools/dataset_mix/inputs.py says what they mean",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet, test.parquet, mixture.json")
    parser.add_argument("--only", choices=SPLITS, help="write this file alone")
    parser.add_argument(
        "--limit",
        nargs="+",
        action="append",
        default=[],
        metavar=("PATTERN", "split=N"),
        help="at most N random rows of each source that matches, as in 'kk_*' train=900 test=100; for each source the "
        "first pattern that matches counts",
    )
    parser.add_argument("--max-train", type=int, help="random so many training rows at most, of all sources together")
    parser.add_argument("--max-test", type=int, help="the same for test rows")
    parser.add_argument("--duplicates", choices=("drop", "keep", "refuse"), default="drop", help="(default: drop)")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Hugging Face tokenizer with a chat template")
    parser.add_argument("--max-prompt-length", type=int, help="drop longer prompts; tokens, so it needs --tokenizer")
    parser.add_argument(
        "--reward",
        nargs="+",
        default=[],
        metavar="PATTERN=NAME",
        help="check that each source's reward function can read its ground truths; as in model.data.rewards",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out and count them")
    parser.add_argument("--seed", type=int, default=0, help="of splits and limits (default: %(default)s)")
    return parser.parse_args(argv)


def parse_limits(limits: Sequence[Sequence[str]]) -> tuple[tuple[str, str, int], ...]:
    """(pattern, split, rows) of the words of every --limit."""
    parsed = []
    for pattern, *pairs in limits:
        for pair in pairs:
            split, _, count = pair.partition("=")
            if split not in SPLITS or not count.isdecimal():
                raise ValueError(f"--limit {pattern} {pair}: write train=N or test=N")
            parsed.append((pattern, split, int(count)))
        if not pairs:
            raise ValueError(f"--limit {pattern}: write train=N, test=N or both after it")
    return tuple(parsed)


def parse_rewards(pairs: Sequence[str]) -> dict[str, str]:
    """{pattern: name} of the words of --reward."""
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"--reward {bad[0]}: write PATTERN=NAME, such as 'kk_*=kk'")
    return {pattern: name for pattern, _, name in (pair.rpartition("=") for pair in pairs)}


def check_bad(found: Scan, args: argparse.Namespace) -> None:
    """Print the first bad rows; ValueError when there are any and they may not be skipped."""
    n_bad = found.bad.total()
    for example in found.examples:
        print(f"{example['place']}: {example['reason']}", file=sys.stderr)
    if n_bad > len(found.examples):
        print(f"and {n_bad - len(found.examples)} more", file=sys.stderr)
    if n_bad and not args.skip_bad:
        raise ValueError(f"{n_bad} of {found.read.total()} rows are bad; nothing was written; mend them or --skip-bad")


def combine(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check, decide, write; returns the summary."""
    inputs = [made for words in args.input for made in parse_input(words)]
    rules = Rules(
        args.seed,
        args.max_prompt_length,
        args.duplicates,
        parse_limits(args.limit),
        {split: n for split, n in (("train", args.max_train), ("test", args.max_test)) if n is not None},
    )
    judge = Judge(parse_rewards(args.reward))
    if args.max_prompt_length is not None and not args.tokenizer:
        raise ValueError(f"--max-prompt-length {args.max_prompt_length}: tokens of which tokenizer? give --tokenizer")
    measure = in_tokens(args.tokenizer) if args.tokenizer else characters
    splits = (args.only,) if args.only else SPLITS
    total = sum(count_rows(made.path) for made in inputs)
    with bar() as progress:
        task = progress.add_task("check", total=total)
        found = scan(inputs, measure, judge, lambda n: progress.advance(task, n))
        check_bad(found, args)
        plan = make_plan(found.rows, rules)
        summary = summarise(inputs, found, plan, args)
        check_plan(summary, taken_by_split(plan), splits, args)
        task = progress.add_task("write", total=total)
        paths = {split: args.out / f"{split}.parquet" for split in splits}
        summary["files"] = write(inputs, found.rows, plan, paths, lambda n: progress.advance(task, n))
    with writing_text(args.out / "mixture.json") as file:
        json.dump(summary, file, indent=1)
    if found.bad:
        console.print(file_table(found))
    console.print(source_table(summary["sources"], summary["length_unit"]))
    return summary


def summarise(inputs: Sequence[Input], found: Scan, plan: Any, args: argparse.Namespace) -> dict[str, Any]:
    """All counts, JSON-able."""
    return {
        "arguments": args.words,
        "inputs": {path: {"rows": n, "bad": found.bad[path]} for path, n in found.read.items()},
        "bad_examples": found.examples,
        "length_unit": "tokens" if args.tokenizer else "characters",
        "duplicates": duplicates(inputs, found.rows, plan),
        "sources": by_source(found.rows, plan),
    }


def check_plan(summary: dict[str, Any], taken: dict[str, int], splits: Sequence[str], args: argparse.Namespace) -> None:
    """ValueError for duplicates where they are refused, and for a file that would have no rows."""
    again = summary["duplicates"]
    if args.duplicates == "refuse" and again["rows"]:
        raise ValueError(f"--duplicates refuse: {again['rows']} prompts repeat another row's; nothing was written")
    for split in splits:
        if not taken[split]:
            other = "train" if split == "test" else "test"
            raise ValueError(
                f"no {split} rows are left, nothing was written; give an input split=…, raise the limits, or write "
                f"--only {other}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    console = Console()
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse(words)
    args.words = words
    try:
        summary = combine(args, console)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    again = summary["duplicates"]
    if again["rows"]:
        across, leaked = again["across_sources"], again["training_rows_of_test_prompts"]
        print(f"{again['rows']} repeated prompts, {across} across sources, {leaked} in training and test")
    if again["other_answer"]:
        print(f"{again['other_answer']} of them with another answer: {' and '.join(again['other_answer_examples'][0])}")
    for split, written in summary["files"].items():
        print(f"{args.out / split}.parquet: {written['rows']} rows, sha256 {written['sha256'][:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
