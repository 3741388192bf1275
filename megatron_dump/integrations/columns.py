"""What a curriculum needs of a Hugging Face data set: each row's source, and a fingerprint of the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

_CHUNK = 4096  # rows in memory at a time


def sources_of(table: Any, source_key: str, key: str) -> list[str]:
    """The source of every row. ValueError, naming `key` (where the column is configured), if there is no such column.

    table: a `datasets.Dataset`; others need its `column_names` and `select_columns(names).iter(batch_size)`.
    """
    if source_key not in table.column_names:
        raise ValueError(f"{key}: the data has no column {source_key!r}; it has {', '.join(table.column_names)}")
    sources: list[str] = []
    for chunk in table.select_columns([source_key]).iter(_CHUNK):
        if None in chunk[source_key]:
            row = len(sources) + chunk[source_key].index(None)
            raise ValueError(f"{key}: row {row} has no {source_key}; every row needs a source")
        sources += map(str, chunk[source_key])
    return sources


def fingerprint_of(table: Any, columns: Sequence[str]) -> str:
    """SHA-256 (hex) over the rows in order: the same wherever the files lie and whatever the cache holds.

    Of values that JSON has no word for (images) only the type counts.
    """
    digest = hashlib.sha256()
    present = [name for name in columns if name in table.column_names]
    for chunk in table.select_columns(present).iter(_CHUNK):
        for row in zip(*(chunk[name] for name in present)):
            digest.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n")
    return digest.hexdigest()
