"""A fingerprint of rows as a host keeps them before they are tokenised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def fingerprint_of_rows(rows: Iterable[Any]) -> str:
    """SHA-256 (hex) over rows in order: mappings, arrays or text; the same wherever their files lie.

    Of values that JSON has no word for (images) only the type counts.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_word).encode() + b"\n")  # rows cannot run together
    return digest.hexdigest()


def _word(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else type(value).__name__
