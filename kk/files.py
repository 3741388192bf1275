"""Rows of parquet and JSONL files, one at a time, each with its number; and text files written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq


class Unread(ValueError):
    """A row cannot be used; the message is the reason."""


def place(path: Path, number: int) -> str:
    """Where a row of `read_rows` is: "file:line", or "file row N" in parquet."""
    return f"{path} row {number}" if path.suffix == ".parquet" else f"{path}:{number}"


def count_rows(path: Path) -> int:
    """Rows of a parquet file, or lines of a JSONL file."""
    if path.suffix == ".parquet":
        return _open_parquet(path).metadata.num_rows
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def read_rows(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unread]]:
    """(number, row) of every row of a .parquet or .jsonl file; a line that is no JSON object comes as the reason.

    Numbers are lines from 1, or rows of a parquet file from 0; `place` words them. `columns`: read only these of a
    parquet file.
    """
    if path.suffix == ".parquet":
        file = _open_parquet(path)
        present = [name for name in file.schema_arrow.names if columns is None or name in columns]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=present):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    elif path.suffix in (".jsonl", ".json"):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parsed(line)
    else:
        raise ValueError(f"{path}: only .parquet and .jsonl files can be read; rename or convert it")


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error


def _parsed(line: bytes) -> dict[str, Any] | Unread:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unread(f"not JSON: {error}")
    return row if isinstance(row, dict) else Unread(f"a {type(row).__name__}, not a JSON object")


@contextlib.contextmanager
def writing_text(path: Path) -> Iterator[TextIO]:
    """A text file to write; it appears under its name when the block ends, and not at all after an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
