"""Prompts out of parquet files.

One row is one prompt, in the columns that verl's data sets use:
  prompt                     list of chat messages {role, content}; other fields of a message are ignored
  reward_model.ground_truth  what the reward function needs; anything but a string is kept as JSON
  <source_key>               the distribution the row belongs to; anything but a string becomes one
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dump.types import Prompt

SOURCE_KEY = "trainer.grpo.curriculum.source_key"


class DataError(ValueError):
    """The data set cannot be used; one line says where and what to do."""


class PromptDataset:
    """All rows of some parquet files, in order; `dataset[i]` is tokenised on first use and kept.

    source_of_rows  list [rows], each row's source
    sources         their sorted names
    fingerprint     SHA-256 (hex) over prompts, ground truths and sources in order: the same wherever the files lie
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        source_key: str = "data_source",
        *,
        encode: Callable[[list[dict[str, str]]], list[int]],  # messages -> token ids, chat template applied
        max_prompt_length: int | None = None,  # tokens
        key: str = "model.data.train_files",  # the config key that `paths` came from, for error messages
    ):
        """Raises FileNotFoundError for a missing file and DataError for missing columns, nulls and empty data."""
        self._encode, self._max_prompt_length = encode, max_prompt_length
        self._messages: list[str] = []  # JSON: compact, and one type whatever the files' own schemas
        self._ground_truths: list[str] = []
        self.source_of_rows: list[str] = []
        files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        for path in files:
            self._read(os.fspath(path), source_key, key)
        if not self.source_of_rows:
            raise DataError(f"{key}: no rows in {', '.join(map(str, files)) or 'an empty list of files'}")
        self.sources: list[str] = sorted(set(self.source_of_rows))
        self.fingerprint: str = self._hash()
        self._prompts: dict[int, Prompt] = {}

    def __len__(self) -> int:
        return len(self.source_of_rows)

    def __getitem__(self, i: int) -> Prompt:
        """IndexError out of range; DataError for a prompt longer than max_prompt_length."""
        row = int(i)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a data set with {len(self)} rows")
        if row not in self._prompts:
            self._prompts[row] = self._tokenise(row)
        return self._prompts[row]

    def check_lengths(self) -> int:
        """Tokenise every row now and return the longest prompt's length: raises at the start, not in mid-run."""
        return max(len(self[row].token_ids) for row in range(len(self)))

    def keep(self, n: int) -> None:
        """Keep n rows, taken from all sources in turn, in their order; all, if there are no more.

        DataError where a source would get none. The fingerprint becomes that of what is kept.
        """
        if n < len(self.sources):
            raise DataError(f"{n} rows are too few for {len(self.sources)} sources, each of which needs one; raise it")
        turns: collections.Counter[str] = collections.Counter()
        order = []
        for row, source in enumerate(self.source_of_rows):
            order.append((turns[source], source, row))
            turns[source] += 1
        kept = sorted(row for _, _, row in sorted(order)[:n])
        self._messages = [self._messages[row] for row in kept]
        self._ground_truths = [self._ground_truths[row] for row in kept]
        self.source_of_rows = [self.source_of_rows[row] for row in kept]
        self.fingerprint, self._prompts = self._hash(), {}

    def _tokenise(self, row: int) -> Prompt:
        messages = json.loads(self._messages[row])
        token_ids = np.array(self._encode(messages), np.int64)
        if self._max_prompt_length is not None and len(token_ids) > self._max_prompt_length:
            raise DataError(
                f"model.data.max_prompt_length={self._max_prompt_length}: the prompt of row {row} "
                f"({self.source_of_rows[row]}) has {len(token_ids)} tokens; raise the limit or drop the row"
            )
        text = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        return Prompt(row, self.source_of_rows[row], token_ids, self._ground_truths[row], text)

    def _read(self, path: str, source_key: str, key: str) -> None:
        """Append one file's rows."""
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{key}: no such file: {path}; run `make data` for the puzzles, or name parquet files that exist"
            )
        try:
            schema = pq.read_schema(path)
            _check_columns(path, schema, source_key)
            table = pq.read_table(path, columns=["prompt", "reward_model", source_key])
        except pa.ArrowException as error:
            raise DataError(f"{key}: {path} cannot be read as parquet: {error}") from error
        columns = [table[name].to_pylist() for name in ("prompt", "reward_model", source_key)]
        for row, (messages, reward_model, source) in enumerate(zip(*columns, strict=True)):
            where = f"{path} row {row}"
            self._messages.append(json.dumps(_checked_messages(where, messages)))
            ground_truth = (reward_model or {}).get("ground_truth")
            self._ground_truths.append(_as_text(where, "reward_model.ground_truth", ground_truth))
            self.source_of_rows.append(_as_text(where, source_key, source))

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for row in zip(self._messages, self._ground_truths, self.source_of_rows, strict=True):
            digest.update(json.dumps(row).encode() + b"\n")  # JSON has no raw newline: rows cannot run together
        return digest.hexdigest()


def _check_columns(path: str, schema: pa.Schema, source_key: str) -> None:
    there = ", ".join(schema.names)
    if source_key not in schema.names:
        raise DataError(f"{path} has no column {source_key!r} ({SOURCE_KEY}); set it to one of: {there}")
    for name in ("prompt", "reward_model"):
        if name not in schema.names:
            raise DataError(f"{path} has no column {name!r}; its columns: {there}")
    kind = schema.field("reward_model").type
    if not pa.types.is_struct(kind) or kind.get_field_index("ground_truth") < 0:
        raise DataError(f"{path}: column 'reward_model' must be a struct with a field 'ground_truth', not {kind}")


def _checked_messages(where: str, messages: Any) -> list[dict[str, str]]:
    if messages is None or len(messages) == 0:
        raise DataError(f"{where}: column 'prompt' is null or empty")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{where}: column 'prompt' must be a list of messages {{role, content}}")
    kept = [{"role": m.get("role"), "content": m.get("content")} for m in messages]
    for message in kept:
        for field, value in message.items():
            if not isinstance(value, str):
                raise DataError(f"{where}: a message's {field!r} is {value!r}, not a string")
    return kept


def _as_text(where: str, column: str, value: Any) -> str:
    if value is None:
        raise DataError(f"{where}: column {column!r} is null")
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
