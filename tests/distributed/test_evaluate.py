"""examples/evaluate.py on forked ranks: what a run's own validation found, from its checkpoints, at any layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from megatron_dump.evaluation import evaluate_policy
from tests.distributed.launch import RankFailed, run_ranks
from tests.distributed.runs import MODEL, REPO, arguments, load_script, make_data, rows, train

SCRIPT = load_script("evaluate")
N = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Two steps on two tensor ranks, a checkpoint and a validation after each."""
    folder = tmp_path_factory.mktemp("run")
    train(
        2,
        data,
        folder,
        2,
        **{
            "model.data.validation_files": f"[{data / 'test.parquet'}]",
            "trainer.grpo.max_steps": 2,
            "trainer.grpo.val_check_interval": 1,
            "trainer.grpo.save_interval": 1,
            "model.optim.lr": 1e-3,
            "trainer.grpo.val_samples_per_prompt": N,
            "trainer.grpo.run_validation_step_0": "true",
            "exp_manager.checkpoint_callback_params.monitor": "critic/score/mean",
        },
    )
    return folder


def evaluate(world, data, tensor=1, pipeline=1, **overrides):
    """The result, which every rank must have alike."""
    settings = {
        "evaluate.modes": "[sampled]",
        "evaluate.samples_per_prompt": N,
        "evaluate.bootstrap_samples": 50,
        "model.data.validation_files": f"[{data / 'test.parquet'}]",
        **overrides,
    }
    asked = arguments(world, data, "unused", tensor, pipeline, **settings)

    def one_rank() -> str:
        told: list[tuple[int, int]] = []
        config, wanted = SCRIPT.read_config(asked)
        found = evaluate_policy(config, wanted, on_progress=lambda *counts: told.append(counts))
        parts = [total for done, total in told if done == total]
        assert len(parts) == len(found["files"]) * len(wanted.modes) and all(done <= total for done, total in told)
        return json.dumps(found)

    found = run_ranks(one_rank, world, timeout_s=200)
    assert len(set(found)) == 1
    return json.loads(found[0])


def validated(run, step: int) -> dict[str, float]:
    [row] = [row for row in rows(run) if row["step"] == step and any(key.startswith("val/") for key in row)]
    return row


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1)])
def test_a_checkpoint_is_what_the_run_found_it_to_be(data, run, world, tensor, pipeline):
    result = evaluate(world, data, tensor, pipeline, **{"evaluate.checkpoint": run / "checkpoints/step_2"})
    table = result["files"]["validation"]["modes"]["sampled"]
    theirs, passed = validated(run, 2), rows(run, "validation.jsonl")[-1]["pass_rates"]
    for source, row in table["sources"].items():
        assert row["pass_rates"] == passed[source]
        for name in ("accuracy", f"pass@{N}", "reward", "length"):
            assert row[name]["value"] == pytest.approx(theirs[f"val/{source}/{name}"], rel=1e-12)
        assert row[f"maj@{N}"]["value"] >= 0
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
        assert row["maj@1"]["value"] == row["pass@1"]["value"] == pytest.approx(row["accuracy"]["value"])
    assert result["checkpoint"].endswith("step_2")
    json.dumps(result, allow_nan=False)


def test_the_folder_it_began_with_and_the_best_checkpoint(data, run):
    """Greedy and sampled, of each file by itself; the best by a metric of training."""
    scores = {row["step"]: row["critic/score/mean"] for row in rows(run) if "critic/score/mean" in row}
    best = max(scores, key=lambda step: (scores[step], step))
    assert (run / "checkpoints/best").resolve() == (run / f"checkpoints/step_{best}").resolve()
    begun = evaluate(1, data)["files"]["validation"]["modes"]["sampled"]["sources"]
    ended = evaluate(1, data, **{"evaluate.checkpoint": run / "checkpoints/best"})
    ended = ended["files"]["validation"]["modes"]["sampled"]["sources"]
    for source in begun:
        assert begun[source]["reward"]["value"] == pytest.approx(validated(run, 0)[f"val/{source}/reward"], rel=1e-12)
        assert ended[source]["reward"]["value"] == pytest.approx(
            validated(run, best)[f"val/{source}/reward"], rel=1e-12
        )
    files = [str(data / f"{name}.parquet") for name in ("test", "train")]
    both = evaluate(
        2,
        data,
        **{
            "evaluate.files": f"[{','.join(files)}]",
            "evaluate.num_prompts": 9,
            "evaluate.modes": "[greedy,sampled]",
        },
    )["files"]
    assert list(both) == files and both[files[0]]["fingerprint"] != both[files[1]]["fingerprint"]
    for file in both.values():
        assert file["prompts"] == 9 and list(file["modes"]) == ["greedy", "sampled"]
        greedy = file["modes"]["greedy"]["sources"]
        assert all(set(row["pass_rates"]) <= {0.0, 1.0} and "pass@1" not in row for row in greedy.values())
        assert [row["prompts"] for row in greedy.values()] == [3, 3, 3]


def test_the_script_writes_and_prints_what_the_tools_take(data, run, tmp_path):
    """One process by the run's own config.yaml; then the card of the same checkpoint has its numbers."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    best, out = run / "checkpoints/best", tmp_path / "evaluation.json"

    def script(*command: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=REPO, env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    OmegaConf.save(SCRIPT.compose_config(arguments(1, data, run), ""), tmp_path / "config.yaml")
    shown = script(
        "examples/evaluate.py",
        f"--config-path={tmp_path}",
        "--config-name=config",
        f"evaluate.checkpoint={best}",
        f"evaluate.files=[{data / 'test.parquet'}]",
        "evaluate.num_prompts=6",
        "evaluate.samples_per_prompt=2",
        f"evaluate.out={out}",
    )
    modes = json.loads(out.read_text())["files"][str(data / "test.parquet")]["modes"]
    assert list(modes) == ["greedy", "sampled"] and f"evaluation: {out}" in shown
    mean = modes["sampled"]["mean"]["maj@2"]["value"]
    assert "sampled, with 95% intervals over prompts" in shown and f"{mean:.3f} (" in shown
    preview = tmp_path / "preview"
    shown = script(
        "tools/upload_to_hub.py",
        best,
        "me/kk",
        "--source",
        MODEL,
        "--license",
        "apache-2.0",
        "--evaluation",
        out,
        "--dry-run",
        preview,
    )
    card = (preview / "README.md").read_text()
    assert f"{mean:.3f} (" in card and f"Of `{best.resolve().name}`" in card and str(tmp_path) not in card
    state = json.loads((best / "state.json").read_text())
    assert state["curriculum"]["fingerprint"] in card and f"training step {state['step']}." in card
    converted = load_file(preview / "model.safetensors")
    assert converted.keys() == load_file(MODEL / "model.safetensors").keys() and "model.safetensors" in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"evaluate.checkpoint": "nowhere"}, "nowhere/model is no checkpoint"),
        (
            {"evaluate.checkpoint": "{run}/checkpoints/step_1", "trainer.precision": "bf16"},
            r"trainer\.precision=bf16.*set trainer\.precision=32",
        ),
        ({"evaluate.files": "[nowhere.parquet]"}, r"evaluate\.files: no such file: nowhere\.parquet"),
        ({"model.grpo.length_params.max_length": 500}, r"max_length=500: with the longest prompt of validation"),
        ({"evaluate.files": "[a.parquet,./a.parquet]"}, "a file comes twice"),
    ],
)
def test_one_line_for_what_cannot_be_used(data, run, overrides, message):
    with pytest.raises(RankFailed, match=message):
        evaluate(1, data, **{key: str(value).format(run=run) for key, value in overrides.items()})


def test_a_damaged_checkpoint_is_refused_by_every_rank(data, run):
    path = next((run / "checkpoints/step_1/model").glob("*.distcp"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(8))
    try:
        with pytest.raises(RankFailed, match=r"ValueError: evaluate\.checkpoint: .*is damaged: its checksum differs"):
            evaluate(2, data, **{"evaluate.checkpoint": run / "checkpoints/step_1"})
    finally:
        path.write_bytes(whole)
