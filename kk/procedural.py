"""Rows of any task of the reasoning-gym library: `python -m kk.procedural --task NAME --out DIR`.

    pip install reasoning-gym
    python -m kk.procedural --task spell_backward chain_sum --train 900 --test 100 --seed 1 --out data/gym

In that library item i + 1 of seed s is item i of seed s + 1, and items may repeat. Here every split of every seed has
a range of item seeds to itself, a question appears once, and its text decides its split: the training and test
questions of a task never meet, whatever the seeds and sizes of the runs that made them.

A row's ground truth is JSON: {"task": name, "config": options of the task, "entry": the library's entry}. A reward
judges by `reasoning_gym.create_dataset(task, **config).score_answer(answer, entry)`, which is from 0 to 1.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from kk.cli import exit_code
from kk.parquet import writing
from kk.progress import bar

SPLITS = ("train", "test")
TEST_SHARE = 5  # one question in TEST_SHARE is a test question
SEEDS = 1 << 22  # item seeds of a split; some tasks take no seed from 2^32 on
MAX_SEED = (1 << 32) // (len(SPLITS) * SEEDS) - 1
CHUNK = 256  # items of one of the library's data sets: some tasks prepare all of them at the start
GIVE_UP = 2000  # items in a row without a new question

SCHEMA = pa.schema(
    {
        "data_source": pa.string(),  # rg_<task>
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),  # the library's category, such as "algebra"
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),  # "rule", JSON text
        "extra_info": pa.struct(
            {
                "split": pa.string(),
                "index": pa.int64(),  # of the question among those of its task and split
                "seed": pa.int64(),  # of the item
                "answer": pa.string(),  # one right answer; null where the library has none
            }
        ),
    }
)


def library() -> Any:
    """The module reasoning_gym. ValueError when it is not installed."""
    try:
        import reasoning_gym  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"reasoning-gym cannot be imported ({error}); pip install reasoning-gym") from None
    return reasoning_gym


def first_seed(seed: int, split: str) -> int:
    """The first of the SEEDS item seeds that belong to this seed and split alone."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed {seed}: must be from 0 to {MAX_SEED}")
    return (len(SPLITS) * seed + SPLITS.index(split)) * SEEDS


def question_key(question: str) -> bytes:
    """The same for questions that differ in white space only."""
    return hashlib.blake2b(" ".join(question.split()).encode(), digest_size=16).digest()


def split_of(question: str) -> str:
    """ "train" or "test": a function of the question alone."""
    return "train" if int.from_bytes(question_key(question), "big") % TEST_SHARE else "test"


def entries(task: str, config: Mapping[str, Any], seed: int, split: str) -> Iterator[tuple[int, dict, Any]]:
    """(item seed, entry, the library's data set that judges it) of distinct questions of that split.

    Ends when the range of item seeds does, or after GIVE_UP items without a new question.
    """
    seen: set[bytes] = set()
    first, last_new = first_seed(seed, split), 0
    for number in range(SEEDS):
        if number - last_new > GIVE_UP:
            return
        if number % CHUNK == 0:
            items = library().create_dataset(task, seed=first + number, size=CHUNK, **config)
        entry = items[number % CHUNK]
        key = question_key(entry["question"])
        if split_of(entry["question"]) == split and key not in seen:
            seen.add(key)
            last_new = number
            yield first + number, entry, items


def check_entry(task: str, entry: dict, judge: Any) -> None:
    """ValueError when the entry may be judged otherwise once it was JSON: it must stay equal, but for the ranges that
    its difficulty was drawn from, or its own answer must still score 1. And when a question mark is a right answer.
    """
    try:
        copy = json.loads(json.dumps(entry))
    except TypeError as error:
        raise ValueError(f"--task {task}: an entry of it cannot be written as JSON: {error}; choose another") from None
    answer = entry["answer"]
    if _judged_by(copy) != _judged_by(entry) and not (
        isinstance(answer, str) and judge.score_answer(answer, copy) == 1.0
    ):
        raise ValueError(f"--task {task}: an entry of it is not judged alike once it was JSON; choose another task")
    if _takes_anything(judge, copy):
        raise ValueError(f"--task {task}: its scorer takes '?' for right; choose another task")


def _takes_anything(judge: Any, entry: dict) -> bool:
    try:
        return entry["answer"] != "?" and judge.score_answer("?", entry) == 1.0
    except Exception:  # noqa: BLE001  scorers raise whatever a text makes them raise
        return False


def _judged_by(entry: dict) -> dict:
    return {**entry, "metadata": {key: value for key, value in entry["metadata"].items() if key != "difficulty"}}


def to_row(
    task: str, config: Mapping[str, Any], split: str, index: int, item: tuple[int, dict, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """One entry as a row of SCHEMA."""
    seed, entry, judge = item
    check_entry(task, entry, judge)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    question = f"{entry['question']} {args.instruction}" if args.instruction else entry["question"]
    truth = {"task": task, "config": dict(config), "entry": entry}
    return {
        "data_source": f"rg_{task}",
        "prompt": [*messages, {"role": "user", "content": question}],
        "ability": judge.category,
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": {"split": split, "index": index, "seed": seed, "answer": entry["answer"]},
    }


def check_tasks(tasks: Sequence[str], config: Mapping[str, Any]) -> None:
    """ValueError for a task that does not exist or does not take these options."""
    from reasoning_gym.factory import DATASETS  # pyright: ignore

    for task in tasks:
        if task not in DATASETS:
            near = difflib.get_close_matches(task, DATASETS, 3) or sorted(DATASETS)
            raise ValueError(f"--task {task}: not among the library's {len(DATASETS)} tasks; {', '.join(near)} are")
        try:
            library().create_dataset(task, seed=0, size=CHUNK, **config)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"--task {task}: it does not take --config {json.dumps(config)}: {error}") from None


def generate(args: argparse.Namespace) -> None:
    """Write both files, or neither. ValueError when a task has too few questions."""
    library()
    check_tasks(args.task, args.config)
    wanted = {"train": args.train, "test": args.test}
    paths = {split: args.out / f"{split}.parquet" for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = stack.enter_context(writing(paths, SCHEMA))
        progress = stack.enter_context(bar())
        for task in args.task:
            for split, count in wanted.items():
                shown = progress.add_task(f"{task}, {split}", total=count)
                stream = entries(task, args.config, args.seed, split)
                for index in range(count):
                    if (item := next(stream, None)) is None:
                        raise ValueError(
                            f"--task {task}: only {index} distinct {split} questions found; lower --{split}"
                        )
                    writers[split].add(to_row(task, args.config, split, index, item, args))
                    progress.advance(shown)
        made_by = {"generator": f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"}
        report = [f"{paths[s]}: {w.rows} rows, sha256 {w.finish(made_by)[:16]}" for s, w in writers.items()]
    print(*report, sep="\n")


def options(text: str) -> dict[str, Any]:
    """--config, a JSON object. ArgumentTypeError for anything else."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from None
    if not isinstance(config, dict) or {"seed", "size"} & config.keys():
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object of the task's options (seed and size are set)")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kk.procedural", description="Tasks of reasoning-gym as data.")
    parser.add_argument("--task", nargs="+", required=True, help="names of the library's tasks")
    parser.add_argument("--config", type=options, default={}, help="options of the tasks, as a JSON object")
    parser.add_argument("--train", type=int, default=900, help="training rows a task (default: %(default)s)")
    parser.add_argument("--test", type=int, default=100, help="test rows a task (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help=f"from 0 to {MAX_SEED} (default: %(default)s)")
    parser.add_argument("--instruction", default="", help="text after each question, in the user's message")
    parser.add_argument("--system", default="", help="text of a system message before each question")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    args = parser.parse_args(argv)
    return exit_code(lambda: generate(args))


if __name__ == "__main__":
    sys.exit(main())
