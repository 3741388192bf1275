"""Parquet files written a row at a time: constant memory, a fingerprint of the rows, and whole files or none.

The fingerprint is the SHA-256 of the rows in order, each as JSON with sorted keys and a line end: two data sets are
the same when theirs agree. It stands in the file's schema metadata under "fingerprint".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_SIZE = 1024  # rows; also what is held in memory

Key = TypeVar("Key", bound=Hashable)


class RowWriter:
    """One parquet file in the making. It lies under a hidden name until `publish`."""

    def __init__(self, path: Path, schema: pa.Schema, row_group_size: int = ROW_GROUP_SIZE) -> None:
        self.path, self.schema, self.row_group_size = path, schema, row_group_size
        self.rows = 0
        self._buffer: list[dict[str, Any]] = []
        self._digest, self._mark = hashlib.sha256(), ""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        # Without the serialised Arrow schema: readers would take the metadata from it, and it is written before the
        # fingerprint is known. The types used here are parquet's own.
        self._writer = pq.ParquetWriter(self._unfinished, schema, store_schema=False)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row with every column of the schema; KeyError for one that is missing or unknown."""
        if row.keys() != set(self.schema.names):
            raise KeyError(f"a row of {self.path} has the columns {', '.join(row)}, not {', '.join(self.schema.names)}")
        self._digest.update(_line(row))
        self._buffer.append(dict(row))
        self.rows += 1
        if len(self._buffer) == self.row_group_size:
            self._flush()

    def finish(self, metadata: Mapping[str, str] | None = None) -> str:
        """Write what is left and close; returns the fingerprint, which goes into the metadata beside `metadata`."""
        if not self._mark:
            if self._buffer:
                self._flush()
            self._mark = self._digest.hexdigest()
            self._writer.add_key_value_metadata({**(metadata or {}), "fingerprint": self._mark})
            self._writer.close()
        return self._mark

    def publish(self) -> None:
        """Give the finished file its name, in one step."""
        self._unfinished.replace(self.path)

    def discard(self) -> None:
        """Remove what was written; nothing to do after `publish`."""
        self._writer.close()
        self._unfinished.unlink(missing_ok=True)

    def _flush(self) -> None:
        batch = pa.RecordBatch.from_pylist(self._buffer, schema=self.schema)
        self._writer.write_batch(batch, row_group_size=self.row_group_size)
        self._buffer = []


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True).encode() + b"\n"


def fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Hex SHA-256 of rows, as the module's text says: what a file that holds them has in its metadata."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_line(row))
    return digest.hexdigest()


@contextlib.contextmanager
def writing(paths: Mapping[Key, Path], schema: pa.Schema) -> Iterator[dict[Key, RowWriter]]:
    """A writer for each path. At the end all files appear together; after an exception none does.

    Call a writer's `finish` inside the block to learn its fingerprint or to set metadata.
    """
    writers: dict[Key, RowWriter] = {}
    try:
        for key, path in paths.items():
            writers[key] = RowWriter(path, schema)
        yield writers
        for writer in writers.values():
            writer.finish()
        for writer in writers.values():
            writer.publish()
    finally:
        for writer in writers.values():
            writer.discard()


def write_parquet(rows: Iterable[Mapping[str, Any]], path: Path, schema: pa.Schema) -> str:
    """Write all rows as one file; returns the fingerprint. The file appears when it is whole."""
    with writing({"": path}, schema) as writers:
        for row in rows:
            writers[""].add(row)
        return writers[""].finish()
