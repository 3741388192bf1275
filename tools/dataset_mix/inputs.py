"""Inputs of a mixture: files with options, and their rows brought to one form."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kk.files import Unread, place, read_rows
from kk.importing import TEMPLATE_TEXT, imported
from kk.rows import to_row

FORMATS = ("chat", "columns", "kk")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """A valid row. What training needs, and where it came from."""

    source: str
    messages: list[dict[str, str]]
    ability: str
    style: str
    ground_truth: str
    split: str  # "train", "test", or "" when that is still to be decided
    extra: str | None  # the row's own extra_info, as JSON


@dataclass(frozen=True)
class Input:
    """One file and how to read it. Every field but `path` is an option key=value of --input."""

    path: Path
    format: str = ""  # chat: columns prompt and reward_model; columns: see below; kk: puzzles. "": by the first row
    source: str = ""  # data_source of every row
    source_column: str = ""  # or the column that tells it; default: data_source
    prompt: str = ""  # format columns: the column of the question, a text or a list of messages
    answer: str = ""  # format columns: the column of the right answer
    answer_after: str = ""  # of which only the text after this mark is the answer, such as ####
    split: str = "file"  # train, test; file: as extra_info.split or the column split says; 0.1: that share of each
    # source to test; 100: so many rows of each source to test
    system: str | None = None  # text of the system message, in place of the row's own; empty: none
    instruction: str = ""  # text after the user's last message
    ability: str = ""  # default: the row's own, or the source

    @property
    def where_to(self) -> str | float | int:
        """`split` as what it means: one of train, test, file; a share below 1; or a count."""
        if self.split in ("train", "test", "file"):
            return self.split
        if re.fullmatch(r"0?\.\d*[1-9]\d*", self.split):
            return float(self.split)
        if re.fullmatch(r"[1-9]\d*", self.split):
            return int(self.split)
        raise ValueError(
            f"--input {self.path} split={self.split}: write train, test, file, a share such as 0.1, or a number of rows"
        )


def parse_input(words: Sequence[str]) -> list[Input]:
    """The words of one --input: a path or pattern, then key=value options. An Input for each file.

    ValueError for what does not exist or contradicts itself.
    """
    pattern, *pairs = words
    known = {field.name for field in fields(Input)} - {"path"}
    options: dict[str, str] = {}
    for pair in pairs:
        key, is_, value = pair.partition("=")
        if not is_ or key not in known:
            raise ValueError(
                f"--input {pattern}: {pair!r} is none of its options: {', '.join(sorted(known))}, as key=value"
            )
        options[key] = value
    made = Input(Path(pattern), **options)  # pyright: ignore[reportArgumentType]
    made.where_to  # noqa: B018 (raises for a value that means nothing)
    if made.format and made.format not in FORMATS:
        raise ValueError(f"--input {pattern} format={made.format}: must be one of {', '.join(FORMATS)}")
    if made.source and made.source_column:
        raise ValueError(f"--input {pattern}: give either source or source_column")
    if bool(made.prompt) != bool(made.answer) or (made.format == "columns" and not made.prompt):
        raise ValueError(f"--input {pattern}: name both columns, prompt=… and answer=…")
    if made.prompt and made.format not in ("", "columns"):
        raise ValueError(f"--input {pattern}: prompt and answer are for format=columns")
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise FileNotFoundError(f"--input {pattern}: no such file")
    return [replace(made, path=path) for path in paths]


def read(given: Input) -> Iterator[tuple[int, Row | Unread]]:
    """(number, row or the reason why it cannot be used) of every row of an input's file."""
    form = "columns" if given.prompt else given.format
    for number, raw in read_rows(given.path):
        if isinstance(raw, Unread):
            yield number, raw
            continue
        form = form or _format_of(place(given.path, number), raw)
        try:
            row = {"chat": _chat, "columns": _columns, "kk": _puzzle}[form](given, raw, number)
            yield number, _finished(given, row)
        except Unread as reason:
            yield number, reason


def _format_of(where: str, raw: Mapping[str, Any]) -> str:
    if "prompt" in raw and "reward_model" in raw:
        return "chat"
    if "quiz" in raw and "statements" in raw:
        return "kk"
    raise ValueError(
        f"{where}: neither columns prompt and reward_model nor a puzzle; name its columns with prompt=… answer=…: "
        f"{', '.join(raw)}"[:400]
    )


def _chat(given: Input, raw: Mapping[str, Any], number: int) -> Row:
    """A row in the columns that megatron_dump.data reads."""
    reward_model = raw.get("reward_model")
    if not isinstance(reward_model, Mapping):
        raise Unread(f"reward_model is {reward_model!r:.60}, not {{style, ground_truth}}")
    truth = _as_text("reward_model.ground_truth", reward_model.get("ground_truth"))
    style = reward_model.get("style")
    messages = _messages("prompt", raw.get("prompt"))
    return _row(given, raw, messages, truth, style if isinstance(style, str) else "rule")


def _columns(given: Input, raw: Mapping[str, Any], number: int) -> Row:
    """A row of any file whose question and answer stand in a column each."""
    if missing := [column for column in (given.prompt, given.answer) if column not in raw]:
        raise Unread(f"no column {missing[0]!r}; there are {', '.join(raw)}")
    question = raw[given.prompt]
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    answer = _as_text(given.answer, raw[given.answer])
    if given.answer_after:
        _, found, answer = answer.rpartition(given.answer_after)
        if not found:
            raise Unread(f"{given.answer} has no {given.answer_after!r}")
    if not answer.strip():
        raise Unread(f"{given.answer} is empty")
    return _row(given, raw, _messages(given.prompt, question), answer.strip(), "rule")


def _puzzle(given: Input, raw: Mapping[str, Any], number: int) -> Row:
    """A published puzzle, checked; template text around it is taken off."""
    puzzle, split, system = imported(raw, number)
    made = to_row(puzzle, split or "", system=system)
    source = {"data_source": made["data_source"]} if not given.source_column else {}
    return _row(given, {**raw, **made, **source}, made["prompt"], made["reward_model"]["ground_truth"], "rule")


def _row(given: Input, raw: Mapping[str, Any], messages: list[dict[str, str]], truth: str, style: str) -> Row:
    column = given.source_column or "data_source"
    if not given.source and column not in raw:
        raise Unread(f"no column {column!r} to tell the source; give source=NAME or source_column=COLUMN")
    source = given.source or _as_text(column, raw[column])
    info = raw.get("extra_info")
    where_to = given.split if given.where_to in ("train", "test") else ""
    if given.where_to == "file":
        where_to = (info.get("split") if isinstance(info, Mapping) else None) or raw.get("split")
        if where_to not in ("train", "test"):
            raise Unread(f"its split is {where_to!r:.60}, not train or test; give split=…")
    ability = given.ability or raw.get("ability")
    extra = None if info is None else json.dumps(info, sort_keys=True, default=str)
    return Row(source, messages, ability if isinstance(ability, str) else source, style, truth, where_to, extra)


def _messages(column: str, value: Any) -> list[dict[str, str]]:
    """Clean chat messages that end with the user's. Unread for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        raise Unread(f"{column} is {value!r:.60}, not a list of messages {{role, content}}")
    messages = [{"role": m.get("role"), "content": m.get("content")} for m in value]
    for message in messages:
        if message["role"] not in ROLES:
            raise Unread(f"{column}: a message's role is {message['role']!r:.60}, not one of {', '.join(ROLES)}")
        content = message["content"]
        if not isinstance(content, str) or not content.strip():
            raise Unread(f"{column}: a message's content is {content!r:.60}, not a text")
        if found := TEMPLATE_TEXT.search(content):
            raise Unread(f"{column}: a message has template text {found[0]!r}; puzzles are cleaned with format=kk")
    if messages[-1]["role"] != "user":
        raise Unread(f"{column}: the last message is the {messages[-1]['role']}'s, not the user's")
    return messages  # pyright: ignore[reportReturnType]


def _finished(given: Input, row: Row) -> Row:
    """With the input's own system message and instruction. Unread when a text is none (half a surrogate pair)."""
    messages = row.messages
    if given.system is not None:
        first = [{"role": "system", "content": given.system}] if given.system else []
        messages = first + [m for m in messages if m["role"] != "system"]
    if given.instruction:
        messages = [*messages[:-1], {"role": "user", "content": f"{messages[-1]['content']} {given.instruction}"}]
    row = replace(row, messages=messages)
    try:
        "".join((row.source, row.ability, row.style, row.ground_truth, *(m["content"] for m in messages))).encode()
    except UnicodeEncodeError:
        raise Unread("it has half of a surrogate pair, which is no character") from None
    return row


def _as_text(column: str, value: Any) -> str:
    if value is None:
        raise Unread(f"{column} is null or missing")
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        raise Unread(f"{column} is {value!r:.60}, which JSON cannot hold") from None
