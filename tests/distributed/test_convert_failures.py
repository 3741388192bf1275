"""Converting what does not fit, on a disk that is full, with too little memory, or killed."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import re
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from megatron_dump.actor import convert, hf_output, weights_checkpoint
from tests.distributed.families import build, tensors, write_family
from tests.distributed.launch import RankFailed, run_ranks


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tied")
    write_family(path, "qwen2-tied")
    return path


def _copy(original: pathlib.Path, to: pathlib.Path, change) -> pathlib.Path:
    """A folder with changed tensors; `change` edits the dictionary, or returns a changed config."""
    to.mkdir()
    weights, config = tensors(original), json.loads((original / "config.json").read_text())
    change(weights, config)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(config))
    return to


HEAD, EMBEDDING, LAST = "lm_head.weight", "model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight"
REFUSED = {
    "missing": (lambda w, c: w.pop(LAST), rf"1 tensors are missing: {LAST}"),
    "another shape": (
        lambda w, c: w.update({LAST: torch.zeros(24, 26)}),
        rf"{LAST} has shape \[24, 26\], config.json makes it \[24, 22\]",
    ),
    "unexpected": (lambda w, c: w.update(surprise=torch.zeros(1)), "1 tensors are not part of the model: surprise"),
    "bias of o_proj": (
        lambda w, c: w.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(24)}),
        "self_attn.o_proj.bias",
    ),
    "quantised": (lambda w, c: w.update({LAST: torch.zeros(24, 22, dtype=torch.float8_e4m3fn)}), f"{LAST} is F8_E4M3"),
    "untied without a head": (lambda w, c: c.update(tie_word_embeddings=False), f"missing: {HEAD}"),
    "tied with another head": (lambda w, c: w.update({HEAD: w[EMBEDDING] + 1}), f"{HEAD} differs from {EMBEDDING}"),
}
TAKEN = {
    "rotation frequencies": lambda w, c: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}),
    "tied with a copy": lambda w, c: w.update({HEAD: w[EMBEDDING].clone()}),
}


def _failures(action, world: int, error: type[Exception]) -> list[str]:
    """The message with which every rank fails."""

    def rank():
        with pytest.raises(error) as caught:
            action()
        return str(caught.value)

    return run_ranks(rank, world)


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_does_not_fit_is_refused_on_every_rank(tied, tmp_path, case):
    change, message = REFUSED[case]
    path = _copy(tied, tmp_path / "model", change)
    for said in _failures(lambda: build(path, pipeline=2), 2, ValueError):
        assert re.search(message, said), said


@pytest.mark.parametrize("case", TAKEN)
def test_a_harmless_tensor_is_no_reason_to_refuse(tied, tmp_path, case):
    path = _copy(tied, tmp_path / "model", TAKEN[case])
    run_ranks(lambda: convert.save_hf(*build(path, tensor=2), str(tmp_path / "out"), source=str(path)), 2)
    assert tensors(tmp_path / "out").keys() == tensors(tied).keys()


def test_damaged_files_are_refused(tied, tmp_path):
    path = _copy(tied, tmp_path / "model", lambda w, c: None)
    whole = (path / "model.safetensors").read_bytes()
    for damage, message in ((whole[:-1], "bytes, not"), (b"\xff" * 99, "header would be"), (b"", "cannot be read")):
        (path / "model.safetensors").write_bytes(damage)
        for said in _failures(lambda: build(path), 2, ValueError):
            assert message in said and "model.safetensors" in said
    (path / "model.safetensors").write_bytes(whole)
    index = path / "model.safetensors.index.json"
    for content, message in (
        ({"weight_map": {LAST: "../model.safetensors"}}, "outside its folder"),
        ({"weight_map": {"absent": "model.safetensors"}}, "not in their files: absent"),
        ({"weight_map": {LAST: "model-00001.safetensors"}}, "model-00001.safetensors cannot be read"),
        ([], "no index"),
    ):
        index.write_text(json.dumps(content))
        for said in _failures(lambda: build(path), 1, ValueError):
            assert message in said


def test_ranks_that_see_different_folders_say_so(tied, tmp_path):
    other = _copy(tied, tmp_path / "model", lambda w, c: w.update({LAST: w[LAST].float()}))
    for said in _failures(lambda: build((tied, other)[int(os.environ["RANK"])]), 2, RuntimeError):
        assert "list of tensors: rank 0 has" in said


def test_an_existing_folder_is_replaced_on_request_only(tied, tmp_path):
    """And never with anything but a model in it; an empty one, or what a killed save left, is in nobody's way."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "out.partial").mkdir()

    def rank():
        policy = build(tied)
        convert.save_hf(*policy, str(out))
        with pytest.raises(RuntimeError, match="out exists: choose another folder"):
            convert.save_hf(*policy, str(out))
        (out / "merges.txt").touch()
        convert.save_hf(*policy, str(out), replace=True)
        assert not (out / "merges.txt").exists()
        (out / "diary").touch()
        for save in (
            lambda: convert.save_hf(*policy, str(out), replace=True),
            lambda: weights_checkpoint.save_weights(policy[0], policy[2], str(out), replace=True),
        ):
            with pytest.raises(RuntimeError, match="out cannot be replaced: move (diary|config.json)"):
                save()
        assert (out / "diary").exists()

    run_ranks(rank, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert tensors(out).keys() == tensors(tied).keys()


def test_the_source_of_another_model_is_refused(tied, tmp_path):
    write_family(tmp_path / "other", "qwen2-tied", num_hidden_layers=3)

    def rank():
        policy = build(tied)
        with pytest.raises(RuntimeError, match=r"layers.3.*shape none there, \[24\] here.*give the folder it started"):
            convert.save_hf(*policy, str(tmp_path / "out"), source=str(tmp_path / "other"))
        weights_checkpoint.save_weights(policy[0], policy[2], str(tmp_path / "checkpoint"))
        wider = build(tmp_path / "other")
        message = r"another model: decoder.layers.\S+ has shape \[4, 24\], not \[3, 24\]"
        with pytest.raises(RuntimeError, match=message):
            weights_checkpoint.load_weights(*wider, str(tmp_path / "checkpoint"))

    run_ranks(rank, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "other"]


def test_a_rank_that_cannot_write_fails_with_all_others(tied, tmp_path):
    """The second stage's writer may not write files of more than 4096 bytes: nobody hangs, nothing is left."""

    def action():
        policy = build(tied, tensor=2, pipeline=2)
        if policy[2].pipeline_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        convert.save_hf(*policy, str(tmp_path / "out"), source=str(tied), max_shard_size="8KB")

    for said in _failures(action, 4, RuntimeError):
        assert "rank 2 failed" in said and "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_leaves_no_folder(tied, tmp_path, monkeypatch):
    written = []

    def save_then_die(*args, real=hf_output.save_file, **options):
        written.append(real(*args, **options))
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def save():
        convert.save_hf(*build(tied, pipeline=2), str(tmp_path / "out"), source=str(tied), max_shard_size="4KB")

    with monkeypatch.context() as patch:
        patch.setattr(hf_output, "save_file", save_then_die)
        with pytest.raises(RankFailed, match="died without a report"):
            run_ranks(save, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    run_ranks(save, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert tensors(tmp_path / "out").keys() == tensors(tied).keys()


_M_MMAP_THRESHOLD = -3  # of mallopt: larger blocks go back to the system when freed, so the peak is what was held


def _memory(key: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, its highest value since `_reset_peak`."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024


def _reset_peak() -> int:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def test_memory_is_bounded_by_a_tensor_and_a_file(tmp_path):
    """A model of 200 MB in files of 20 MB, on two tensor ranks of 100 MB each."""
    path, shard = tmp_path / "model", 20_000_000
    write_family(
        path,
        "qwen2-untied",
        max_shard_size="20MB",
        vocab_size=9001,
        hidden_size=1024,
        intermediate_size=2730,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    group = 9001 * 1024 * 2  # the embedding, the largest
    assert total > 10 * shard and group < shard

    def rank():
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 18)
        policy = build(path, precision="bf16", tensor=2)
        own = sum(p.nbytes for module in policy[0] for p in module.parameters())
        before = _reset_peak()
        convert.load_hf(*policy, str(path))
        load = _memory("VmHWM") - before
        before = _reset_peak()
        convert.save_hf(*policy, str(tmp_path / "out"), source=str(path), max_shard_size=shard)
        return own, load, _memory("VmHWM") - before

    for own, load, save in run_ranks(rank, 2):
        assert own < 0.55 * total
        assert load < 2 * shard + group  # two mapped files, where a group spans them, and what is made of their tensors
        assert save < shard + 2 * group + 4e6  # gloo gathers with a buffer of its own
    assert tensors(tmp_path / "out").keys() == tensors(path).keys()
