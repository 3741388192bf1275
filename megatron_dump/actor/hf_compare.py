"""Are two Hugging Face folders the same model, byte by byte, however their tensors are spread over files?"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator

from megatron_dump.actor.hf_files import Entry, HFTensors

_CHUNK = 1 << 24  # bytes compared at once


def differences(
    a: str | pathlib.Path,
    b: str | pathlib.Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """One line for each tensor, and for a config.json, that only one has or that differs; [] when they are equal.

    Reads 16 MB of each folder at a time. on_progress: is given how many tensors are done, and of how many.
    ValueError or FileNotFoundError when a folder cannot be read.
    """
    first, second = HFTensors(a), HFTensors(b)
    found, names = [], sorted(first.entries.keys() | second.entries.keys())
    for done, name in enumerate(names):
        on_progress(done, len(names))
        ours, theirs = first.entries.get(name), second.entries.get(name)
        if ours is None or theirs is None:
            found.append(f"{name} is only in {b if ours is None else a}")
        elif (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            found.append(f"{name} is {_kind(ours)} in {a}, {_kind(theirs)} in {b}")
        elif any(x != y for x, y in zip(_chunks(first.path, ours), _chunks(second.path, theirs), strict=True)):
            found.append(f"{name} has different contents")
    configs = [json.loads((tensors.path / "config.json").read_text()) for tensors in (first, second)]
    keys = sorted(k for k in configs[0].keys() | configs[1].keys() if configs[0].get(k) != configs[1].get(k))
    return [*found, *(f"config.json: {key} differs" for key in keys)]


def _kind(entry: Entry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"


def _chunks(folder: pathlib.Path, entry: Entry) -> Iterator[bytes]:
    with (folder / entry.file).open("rb") as file:
        file.seek(entry.start)
        remaining = entry.size
        while remaining > 0 and (chunk := file.read(min(_CHUNK, remaining))):
            remaining -= len(chunk)
            yield chunk
