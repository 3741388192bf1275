"""The safetensors files of a Hugging Face folder: what is in them, and their tensors read in slices."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names of what is read
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Tensors of published checkpoints that follow from config.json: Llama's frequencies of rotation.
DERIVED = re.compile(r".*\brotary_emb\.inv_freq")
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is."""

    file: str  # name inside the folder
    dtype: str  # safetensors' name: F32, BF16, …
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    size: int  # in bytes


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, from its header alone. ValueError for a damaged or cut file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            entries[name] = Entry(path.name, tensor["dtype"], tuple(tensor["shape"]), 8 + length + begin, end - begin)
        size = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
        if path.stat().st_size != size:
            raise ValueError(f"it has {path.stat().st_size} bytes, not {size}")
        return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); copy it again") from error


class HFTensors:
    """The tensors of a Hugging Face folder by name.

    At most the files of one group of tensors are open at a time (`open`): mapped files count as this process's memory.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Reads the headers of all files. ValueError for a file that is missing, damaged or not as the index says."""
        self.path = pathlib.Path(path)
        self.entries: Mapping[str, Entry] = self._read_entries()
        if not self.entries:
            raise ValueError(f"{self.path}: its safetensors files hold no tensors; copy the model again")
        self._open: dict[str, Any] = {}

    def _read_entries(self) -> dict[str, Entry]:
        index = self.path / INDEX
        if not index.is_file():
            if not (self.path / SINGLE).is_file():
                raise FileNotFoundError(f"{self.path}: no {SINGLE} and no {INDEX} there; give a model folder")
            return read_header(self.path / SINGLE)
        try:
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            inside = all(pathlib.PurePath(file).name == file for file in files.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of safetensors files ({error}); copy it again") from error
        if not inside:
            raise ValueError(f"{index} names files outside its folder; copy the model again")
        entries = {n: e for file in sorted(set(files.values())) for n, e in read_header(self.path / file).items()}
        absent = [name for name, file in files.items() if name not in entries or entries[name].file != file]
        if absent:
            raise ValueError(f"{index} names tensors that are not in their files: {some(absent)}; copy the model again")
        return entries

    def digest(self) -> str:
        """SHA-256 of names, files, types and shapes, for ranks to agree on."""
        rows = sorted((name, entry.file, entry.dtype, entry.shape) for name, entry in self.entries.items())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def files_of(self, names: Iterable[str]) -> list[str]:
        """The files that hold these tensors, sorted."""
        return sorted({self.entries[name].file for name in names})

    def open(self, files: Iterable[str]) -> None:
        """Close every file but these, and open those of them that are not open yet."""
        files = set(files)
        self._open = {name: file for name, file in self._open.items() if name in files}
        for name in files - self._open.keys():
            self._open[name] = self._guard(name, lambda name=name: safe_open(self.path / name, "pt"))

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A tensor of an open file: the whole, or [start, stop) along dimension 0 or 1, clipped to its end."""
        file = self._open[self.entries[name].file]

        def read() -> Tensor:
            if dim is None:
                return file.get_tensor(name)
            rows = file.get_slice(name)
            return rows[start:stop] if dim == 0 else rows[:, start:stop]

        return self._guard(self.entries[name].file, read)

    def _guard(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / name} cannot be read ({error}); copy it again") from error


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
