"""Reading, writing and comparing Hugging Face folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dump.actor.hf_compare import differences
from megatron_dump.actor.hf_files import HFTensors, some
from megatron_dump.actor.hf_output import ShardWriter, parse_size


def write(path, tensors, n_files: int = 1, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if n_files == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names, where = sorted(tensors), {}
    for i in range(n_files):
        part = {name: tensors[name] for name in names[i::n_files]}
        save_file(part, path / f"part-{i}.safetensors")
        where |= dict.fromkeys(part, f"part-{i}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {name: torch.randn(5, 6).bfloat16() for name in "abcdef"}


def test_slices_are_those_of_the_tensor(tmp_path, tensors):
    folder = HFTensors(write(tmp_path / "m", tensors, 3))
    folder.open(folder.files_of("abcdef"))
    for name, tensor in tensors.items():
        assert torch.equal(folder.read(name), tensor)
        assert torch.equal(folder.read(name, 0, 1, 4), tensor[1:4])
        assert torch.equal(folder.read(name, 1, 2, 6), tensor[:, 2:6])
        assert folder.read(name, 0, 5, 5).shape == (0, 6)


def test_files_hold_at_most_so_much(tmp_path, tensors):
    writer = ShardWriter(tmp_path, "stage", 130)  # bytes; each tensor has 60
    for name, tensor in tensors.items():
        writer.add(name, tensor, torch.float32 if name == "c" else torch.bfloat16)
    writer.add("large", torch.zeros(99), torch.float32)
    writer.flush()
    held = [list(load_file(file)) for file in sorted(tmp_path.iterdir())]
    assert held == [["a", "b"], ["c"], ["d", "e"], ["f"], ["large"]] and writer.n_files == 5
    assert load_file(tmp_path / "stage-00001.safetensors")["c"].dtype == torch.float32


def test_the_writer_keeps_what_it_was_given(tmp_path):
    tensor, writer = torch.ones(2), ShardWriter(tmp_path, "stage", 100)
    writer.add("a", tensor, torch.float32)
    tensor.zero_()
    writer.flush()
    assert load_file(tmp_path / "stage-00000.safetensors")["a"].tolist() == [1, 1]


def test_differences(tmp_path, tensors):
    one, three = write(tmp_path / "1", tensors, 1, a=1), write(tmp_path / "3", tensors, 3, a=1)
    told = []
    assert differences(one, three, lambda *counts: told.append(counts)) == []
    assert told == [(i, len(tensors)) for i in range(len(tensors))]
    changed = {**tensors, "c": tensors["c"].float(), "e": tensors["e"].view(6, 5), "g": torch.ones(1)}
    changed["b"] = tensors["b"].clone()
    changed["b"][0, 0] = -changed["b"][0, 0]
    del changed["d"]
    other = write(tmp_path / "other", changed, 2, a=2)
    assert differences(one, other) == [
        "b has different contents",
        f"c is BF16[5, 6] in {one}, F32[5, 6] in {other}",
        f"d is only in {one}",
        f"e is BF16[5, 6] in {one}, BF16[6, 5] in {other}",
        f"g is only in {other}",
        "config.json: a differs",
    ]
    zero, minus = ({"x": torch.tensor([sign * 0.0])} for sign in (1, -1))
    assert differences(write(tmp_path / "+0", zero), write(tmp_path / "-0", minus)) == ["x has different contents"]


@pytest.mark.parametrize(("size", "n"), [(7, 7), ("7B", 7), ("5GB", 5 * 10**9), ("500 MB", 500 * 10**6), ("2kb", 2000)])
def test_sizes(size, n):
    assert parse_size(size) == n


@pytest.mark.parametrize("size", [0, -1, "", "5", "GB", "5GiB", "0MB", "1.5GB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(size)


def test_some():
    assert some("abc") == "a, b, c" and some("abcdefg") == "a, b, c, d, e and 2 more"


def test_no_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        HFTensors(tmp_path)
    with pytest.raises(ValueError, match="hold no tensors"):
        HFTensors(write(tmp_path / "m", {}))
