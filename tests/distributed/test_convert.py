"""Hugging Face -> Megatron -> Hugging Face: every family, every layout, to the last bit."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dump.actor import convert, hf_files
from megatron_dump.actor.checkpoint import Checkpoints
from tests.distributed.families import DENSE, FAMILIES, build, tensors, write_family
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import make_actor, write_model

REPO = pathlib.Path(__file__).resolve().parents[2]


def _tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", REPO / "tools/convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
OPTIONS = {
    "tensor": "tensor-model",
    "pipeline": "pipeline-model",
    "virtual_pipeline": "virtual-pipeline-model",
    "expert": "expert-model",
    "expert_tensor": "expert-tensor",
}
LAYOUTS = {  # name -> world size, fields of Layout
    "one": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2": (2, {}),
    "EP2": (2, {"expert": 2}),
    "EP4": (4, {"expert": 4}),
    "TP2xETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "TP2xPP2xEP2": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "PP2xVPP2xEP2": (4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
}
WAYS = [("TP2xPP2", "one"), ("one", "TP2xPP2"), ("PP2xVPP2", "TP2"), ("DP2", "PP2xVPP2")]
EXPERT_WAYS = [("TP2xPP2xEP2", "one"), ("PP2xVPP2xEP2", "EP4"), ("one", "TP2xPP2xEP2"), ("EP2", "TP2xETP2")]


def convert_with(layout: str, *arguments: str) -> None:
    """The tool's command on the ranks of a layout."""
    world, sizes = LAYOUTS[layout]
    options = [word for field, size in sizes.items() for word in (f"--{OPTIONS[field]}-parallel-size", str(size))]
    assert run_ranks(lambda: TOOL.main([*map(str, arguments), *options]), world) == [0] * world


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> its folder, written once."""
    written: dict[str, pathlib.Path] = {}

    def folder(family: str) -> pathlib.Path:
        if family not in written:
            written[family] = tmp_path_factory.mktemp(family)
            write_family(written[family], family, max_shard_size="6KB" if family in ("qwen3", "qwen2-moe") else "5GB")
        return written[family]

    return folder


@pytest.mark.parametrize(
    ("family", "there", "back"),
    [
        *((f, *way) for f in DENSE for way in WAYS),
        *((f, *way) for f in FAMILIES if f not in DENSE for way in EXPERT_WAYS),
    ],
)
def test_round_trip_is_byte_equal(folders, tmp_path, family, there, back):
    """HF -> checkpoint under one layout -> HF under another; transformers' own file when there is one file."""
    original, out = folders(family), tmp_path / "out"
    convert_with(there, "to-megatron", original, tmp_path / "checkpoint")
    convert_with(back, "to-hf", tmp_path / "checkpoint", out, "--source", original)
    expected, saved = tensors(original), tensors(out)
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert saved[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(saved[name].view(torch.int16), tensor.view(torch.int16)), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (original / name).read_bytes()
    if back == "one" and (original / "model.safetensors").exists():
        assert (out / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
        assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert TOOL.main(["check", str(original), str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_a_run_in_fp32_saves_the_dtypes_it_started_from(folders, tmp_path):
    original = folders("qwen2-untied")

    def rank():
        policy = build(original, tensor=2)
        convert.save_hf(*policy, str(tmp_path / "same"), source=str(original))
        convert.save_hf(*policy, str(tmp_path / "config"))
        convert.save_hf(*policy, str(tmp_path / "wide"), source=str(original), dtype=torch.float32)

    run_ranks(rank, 2)
    expected = tensors(original)
    for name in ("same", "config", "wide"):
        saved = tensors(tmp_path / name)
        assert saved.keys() == expected.keys()
        for key, tensor in expected.items():
            assert saved[key].dtype == (torch.float32 if name == "wide" else torch.bfloat16)
            assert torch.equal(saved[key].float(), tensor.float())
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    assert not (tmp_path / "config/tokenizer.json").exists()


def test_the_tools_dtypes(folders, tmp_path, capsys):
    """An fp32 checkpoint of a bf16 folder goes back to it, to the last bit; another dtype only when asked for."""
    original = str(folders("qwen2-untied"))
    convert_with("one", "to-megatron", original, tmp_path / "checkpoint", "--precision", "32")
    convert_with("one", "to-hf", tmp_path / "checkpoint", tmp_path / "same", "--source", original)
    convert_with("TP2", "to-hf", tmp_path / "checkpoint", tmp_path / "wide", "--source", original, "--dtype", "fp32")
    assert TOOL.main(["check", original, str(tmp_path / "same")]) == 0
    assert TOOL.main(["check", original, str(tmp_path / "wide")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(tensors(pathlib.Path(original))) + 1 and "config.json: dtype differs" in said[-1]
    assert TOOL.main(["to-hf", str(tmp_path), str(tmp_path / "out"), "--source", original]) == 1
    assert "is no checkpoint: give the step_<n> folder of a run" in capsys.readouterr().err


def test_a_runs_checkpoint_becomes_the_folder_its_actor_saves(tmp_path):
    """Trained weights, with the optimizer beside them in the checkpoint; the tool runs as a process of its own."""
    path = tmp_path / "model"
    write_model(str(path))

    def rank():
        actor = make_actor(str(path), 2, 2)
        with torch.no_grad():
            for module in actor.modules:
                for parameter in module.parameters():
                    parameter.mul_(1.5)
        Checkpoints(tmp_path / "checkpoints", actor).save(3, {})
        convert.save_hf(actor.modules, actor.arch, actor.parallel, str(tmp_path / "direct"), source=str(path))

    run_ranks(rank, 4)
    command = [
        sys.executable,
        REPO / "tools/convert_checkpoint.py",
        "to-hf",
        tmp_path / "checkpoints/step_3",
        tmp_path / "out",
        "--source",
        path,
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert TOOL.main(["check", str(tmp_path / "direct"), str(tmp_path / "out")]) == 0
    for name, tensor in tensors(path).items():
        assert torch.equal(tensors(tmp_path / "out")[name], tensor * 1.5)


def test_sharded_folders(tmp_path, monkeypatch):
    """Each file is opened once, or again where a group of tensors spans two; what is saved keeps to max_shard_size."""
    original = tmp_path / "original"
    model = write_family(original, "qwen2-untied", max_shard_size="6KB")
    files = list(original.glob("*.safetensors"))
    opened = []
    monkeypatch.setattr(hf_files, "safe_open", lambda p, f, real=hf_files.safe_open: opened.append(p) or real(p, f))

    def rank():
        policy = build(original)
        convert.save_hf(*policy, str(tmp_path / "out"), source=str(original), max_shard_size="9KB")
        return len(opened)

    (n_opened,) = run_ranks(rank, 1)
    assert len(files) > 3 and n_opened <= 2 * len(files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for file in (tmp_path / "out").glob("*.safetensors"):
        held = [name for name, where in index["weight_map"].items() if where == file.name]
        assert sum(tensors(tmp_path / "out")[n].nbytes for n in held) <= 9000 or len(held) == 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(original).values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
