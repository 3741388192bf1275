"""The demo's run on several versions of megatron-core: equal losses and draws; each continues the other's checkpoint.

`make test-newest` runs it. OTHER_MEGATRON_CORES names folders, each with one more version of megatron-core in it.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.versions
REPO = pathlib.Path(__file__).resolve().parents[2]
INSTALLED = ""
OTHERS = os.environ.get("OTHER_MEGATRON_CORES", "").split()
NOT_COMPARED = ("timing_s/", "perf/")


def run(version: str, log_dir: pathlib.Path, data: pathlib.Path, **overrides) -> None:
    """kk_cpu at TP2×PP2, three steps; `version`: the folder to take megatron-core from."""
    settings = {
        "trainer.devices": 4,
        "trainer.grpo.max_steps": 3,
        "trainer.grpo.val_check_interval": 0,
        "trainer.grpo.save_interval": 2,
        "model.data.train_files": f"[{data}/train.parquet]",
        "model.data.validation_files": "[]",
        "exp_manager.explicit_log_dir": log_dir,
        **overrides,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "examples/train_gpt_grpo.py"]
    command += ["--config-name=kk_cpu", *(f"{key}={value}" for key, value in settings.items())]
    environment = {**os.environ, "PYTHONPATH": version, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def steps(log_dir: pathlib.Path) -> dict[int, dict[str, float]]:
    """Step -> its metrics, without those that tell the time."""
    rows = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {key: value for key, value in row.items() if not key.startswith(NOT_COMPARED)} for row in rows}


def draws(log_dir: pathlib.Path) -> dict[int, list]:
    """Step -> the prompts drawn for it and the rollouts of each."""
    rows = [json.loads(line) for line in (log_dir / "curriculum.jsonl").read_text().splitlines()]
    found = {row["step"]: row["draw"] for row in rows if row["event"] == "draw"}
    return {step: [draw["prompt_ids"], draw["rollouts"]] for step, draw in found.items()}


def assert_same_step(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    apart = {k: (found[k], v) for k, v in expected.items() if not math.isclose(found[k], v, rel_tol=1e-5, abs_tol=1e-5)}
    assert not apart


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    puzzles = "--people 2-4 --per-size 100 --test-per-size 8 --names 8 --frames 1 --seed 5"
    for module, options in (("kk.generate", puzzles), ("kk.dataset", f"--in {folder}")):
        subprocess.run([sys.executable, "-m", module, *options.split(), "--out", str(folder)], check=True, cwd=REPO)
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Version -> log folder of three steps with it."""
    folder = tmp_path_factory.mktemp("runs")
    places = {version: folder / str(i) for i, version in enumerate([INSTALLED, *OTHERS])}
    for version, place in places.items():
        run(version, place, data)
    return places


def test_there_is_another_version():
    assert OTHERS, "OTHER_MEGATRON_CORES names no folder; make test-newest sets it"
    code = "from megatron.core import package_info, __file__ as file; print(package_info.__version__, file)"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": version}, capture_output=True, text=True
        ).stdout.split()
        for version in [INSTALLED, *OTHERS]
    ]
    assert len({version for version, _ in found}) == len(found)
    assert all(file.startswith(folder) for folder, (_, file) in zip([INSTALLED, *OTHERS], found, strict=True))


@pytest.mark.parametrize("other", OTHERS, ids=os.path.basename)
def test_losses_and_draws_are_equal(runs, other):
    ours, theirs = steps(runs[INSTALLED]), steps(runs[other])
    assert len(ours) == len(theirs) == 3
    for step in ours:
        assert_same_step(theirs[step], ours[step])
    assert draws(runs[other]) == draws(runs[INSTALLED])


@pytest.mark.parametrize("other", OTHERS, ids=os.path.basename)
@pytest.mark.parametrize("to_other", [True, False], ids=["read_by_it", "written_by_it"])
def test_each_continues_the_others_checkpoint(runs, data, tmp_path, other, to_other):
    writer, reader = (INSTALLED, other) if to_other else (other, INSTALLED)
    chosen = {"exp_manager.resume_from_checkpoint": runs[writer] / "checkpoints/step_2"}
    run(reader, tmp_path / "log", data, **chosen)
    resumed = steps(tmp_path / "log")
    assert list(resumed) == [3]
    assert_same_step(resumed[3], steps(runs[writer])[3])
    assert draws(tmp_path / "log")[3] == draws(runs[writer])[3]
