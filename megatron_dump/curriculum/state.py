"""A curriculum's state as JSON, and from one run to a changed one: arrays of sources are matched by name."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
_READABLE = 1024  # arrays up to this size are kept as numbers; larger ones compressed


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """JSON-able; every bit survives. Dtypes are little-endian numbers or bool."""
    return {name: _pack(np.asarray(array)) for name, array in arrays.items()}


def unpack(packed: Mapping[str, Any]) -> Arrays:
    """What `pack` was given."""
    return {name: _unpack(entry) for name, entry in packed.items()}


def _pack(array: np.ndarray) -> dict[str, Any]:
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    head = {"dtype": array.dtype.str, "shape": list(array.shape)}
    if array.size <= _READABLE and (array.dtype.kind in "biu" or np.isfinite(array).all()):
        return {**head, "values": array.reshape(-1).tolist()}
    return {**head, "zlib": base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()}


def _unpack(entry: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(entry["dtype"])
    if "values" in entry:
        array = np.array(entry["values"], dtype)
    else:
        array = np.frombuffer(zlib.decompress(base64.b64decode(entry["zlib"])), dtype)
    return array.reshape(entry["shape"]).astype(dtype.newbyteorder("="))


def by_name(saved: Arrays, fresh: Arrays, old: Sequence[str], new: Sequence[str]) -> tuple[Arrays, list[str]]:
    """Arrays with a row a source, carried over to another list of sources.

    saved: rows in the order of `old`; fresh: rows in the order of `new`, for sources that were not there. Returns the
    arrays and the names of those that could not be carried over (other shape or absent): they stay fresh.
    """
    place = {name: i for i, name in enumerate(old)}
    known = np.array([name in place for name in new], bool)
    rows = np.array([place[name] for name in new if name in place], np.int64)
    carried, lost = {}, []
    for name, array in fresh.items():
        if name not in saved or saved[name].shape[1:] != array.shape[1:] or len(saved[name]) != len(old):
            carried[name] = array
            lost.append(name)
            continue
        carried[name] = array.copy()
        carried[name][known] = saved[name][rows]
    return carried, lost
