"""Writing a Hugging Face folder: safetensors files of bounded size, index, configuration and tokenizer."""

from __future__ import annotations

import copy
import json
import pathlib
import re
import shutil
from collections.abc import Sequence

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_dump.actor.architecture import Architecture
from megatron_dump.actor.hf_files import DERIVED, DTYPES, HEAD, INDEX, SINGLE, Entry, HFTensors, read_header, some
from megatron_dump.actor.partial_folder import PartialFolder

# What belongs to a model besides its weights and config.json: the tokenizer in all its forms, generation settings.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
_WRITTEN = ("config.json", INDEX, "*.safetensors", *_COMPANIONS)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class ShardWriter:
    """Tensors into safetensors files of at most `max_bytes` (a larger tensor has its own); holds one file's worth."""

    def __init__(self, folder: pathlib.Path, stem: str, max_bytes: int) -> None:
        self.folder, self.stem, self.max_bytes = folder, stem, max_bytes
        self.n_files = 0
        self._held: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """Take a copy of the tensor, on CPU, as `dtype`."""
        size = tensor.numel() * dtype.itemsize
        if self._bytes + size > self.max_bytes:
            self.flush()
        self._held[name] = tensor.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        self._bytes += size

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            path = self.folder / shard_name(self.stem, self.n_files)
            path.touch()
            mode = path.stat().st_mode  # the umask's: safetensors makes files that nobody else may read
            save_file(self._held, path, metadata={"format": "pt"})
            path.chmod(mode)
            self.n_files += 1
        self._held, self._bytes = {}, 0


def shard_name(stem: str, number: int) -> str:
    """The name of a ShardWriter's file, numbered from 0, until `OutputFolder.finish` gives it its final one."""
    return f"{stem}-{number:05d}.safetensors"


class OutputFolder:
    """A Hugging Face folder in the making: files that ranks write into `folder.partial`, and what goes with them."""

    def __init__(
        self, path: str, arch: Architecture, source: str | None, dtype: torch.dtype | None, replace: bool
    ) -> None:
        self.arch, self.folder = arch, PartialFolder(path, _WRITTEN if replace else ())
        self.source = None if source is None else pathlib.Path(source)
        self.dtype = dtype
        self._original: HFTensors | None = None  # the source's weights, where it has any
        self._named: torch.dtype | None = None  # the dtype of its config.json

    def read_source(self) -> None:
        """Look at the source's tensors. FileNotFoundError or ValueError when it is no Hugging Face folder."""
        if self.source is None:
            self._named = _dtype(self.arch.hf.dtype)
            return
        config = json.loads((self.source / "config.json").read_text())
        self._named = _dtype(config.get("dtype") or config.get("torch_dtype"))
        if any((self.source / name).is_file() for name in (INDEX, SINGLE)):
            self._original = HFTensors(self.source)

    def dtype_of(self, name: str, own: torch.dtype) -> torch.dtype:
        """What a tensor, in memory of dtype `own`, is saved as."""
        if self.dtype is not None:
            return self.dtype
        if self._original is not None and name in self._original.entries:
            return DTYPES.get(self._original.entries[name].dtype, own)
        return self._named or own

    def finish(self, files: Sequence[str]) -> None:
        """Name these files of ShardWriters, write the index and everything else, and move the folder to its place.

        ValueError when the tensors are not those of the source.
        """
        entries = self._name_files(files)
        self._check(entries)
        self._write_config()
        for file in [] if self.source is None else [f for p in _COMPANIONS for f in self.source.glob(p)]:
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, self.folder.partial / file.name)
        self.folder.publish()

    def _name_files(self, files: Sequence[str]) -> dict[str, Entry]:
        total, entries = 0, {}
        for number, name in enumerate(files, 1):
            final = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            (self.folder.partial / name).rename(self.folder.partial / final)
            header = read_header(self.folder.partial / final)
            if twice := sorted(header.keys() & entries.keys()):
                raise ValueError(f"{self.folder.path}: written by two pipeline stages: {some(twice)}")
            entries |= header
            total += sum(entry.size for entry in header.values())
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": {n: e.file for n, e in sorted(entries.items())}}
            (self.folder.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return entries

    def _check(self, entries: dict[str, Entry]) -> None:
        if self._original is None:
            return
        ours = {name: entry.shape for name, entry in entries.items()}
        theirs = {name: entry.shape for name, entry in self._original.entries.items() if not DERIVED.fullmatch(name)}
        if self.arch.tied:
            theirs.pop(HEAD, None)  # a copy of the embedding
        differ = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        if differ:
            told = [f"{n} has shape {_shape(theirs.get(n))} there, {_shape(ours.get(n))} here" for n in differ]
            raise ValueError(f"the model is not that of {self.source}: {some(told)}; give the folder it started from")

    def _write_config(self) -> None:
        if self.source is None:
            config = copy.deepcopy(self.arch.hf)
            if self.dtype is not None:
                config.dtype = self.dtype
            config.save_pretrained(self.folder.partial)
        elif self.dtype is None:
            shutil.copyfile(self.source / "config.json", self.folder.partial / "config.json")
        else:
            config = json.loads((self.source / "config.json").read_text())
            key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
            config[key] = str(self.dtype).removeprefix("torch.")
            (self.folder.partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _dtype(named: object) -> torch.dtype | None:
    """The dtype that a config.json names, as a string or already read; None when it is no dtype of weights."""
    name = str(named).removeprefix("torch.")
    return getattr(torch, name) if name in ("float32", "float16", "bfloat16") else None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def parse_size(size: int | str) -> int:
    """Bytes of `max_shard_size` as transformers writes it: a number, or one with a decimal unit such as "5GB"."""
    match = re.fullmatch(r"(\d+) ?([KMGT]?)B", size if isinstance(size, str) else f"{size}B", re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"max_shard_size={size!r}: write a number of bytes, or a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2].upper()]
