"""tools/benchmark_convergence.py: its measures against hand-made curves, and one small benchmark of real runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tools"))

from convergence_bench.arms import all_arms  # noqa: E402
from convergence_bench.measures import Measured, read, rising, spent_to_baseline, tokens_to  # noqa: E402
from convergence_bench.results import gather  # noqa: E402

from megatron_dump.curriculum.curriculum import Curriculum  # noqa: E402
from megatron_dump.report.run import read_run  # noqa: E402
from tests.unit.recorded_runs import write_run  # noqa: E402

GRID = np.linspace(0.0, 100.0, 81)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_rising_is_the_min_max_formula_of_isotonic_regression(values):
    """Robertson, Wright & Dykstra 1988, theorem 1.4.4: the largest over starts of the smallest over ends of a mean."""
    n = len(values)
    expected = [max(min(np.mean(values[a : b + 1]) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    assert np.allclose(rising(np.array(values)), expected, atol=1e-12)


def test_tokens_are_interpolated_where_the_curve_reaches_the_target():
    grid, curve = np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.1, 0.2, 0.2, 0.4])
    assert tokens_to(grid, curve, 0.15) == pytest.approx(5.0)
    assert tokens_to(grid, curve, 0.2) == 10.0
    assert tokens_to(grid, curve, 0.3) == pytest.approx(25.0)
    assert tokens_to(grid, curve, 0.05) == 0.0
    assert tokens_to(grid, curve, 0.41) == math.inf


def test_an_arm_twice_as_fast_needs_half_the_tokens_whatever_seeds_are_drawn():
    means = {
        "uniform": np.stack([GRID, GRID * 1.1, GRID * 0.9]) / 100,
        "dump_ucb": np.minimum(np.stack([GRID, GRID * 1.1, GRID * 0.9]) * 2 / 100, 1.5),
        "never": np.zeros((3, 81)),
    }
    spent = spent_to_baseline(means, GRID, "uniform", "dump_ucb")
    assert spent["uniform"]["tokens"].value == 100.0
    half = spent["dump_ucb"]["uniform"]
    assert [half.value, half.low, half.high] == pytest.approx([0.5, 0.5, 0.5])
    assert spent["uniform"]["dump_ucb"].value == pytest.approx(2.0)
    assert spent["never"]["tokens"].value == math.inf and spent["never"]["uniform"].low == math.inf


def test_an_interval_holds_the_value_and_grows_with_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    spread = {}
    for noise in (0.02, 0.1):
        slopes = 1 + rng.normal(0, noise, (2, 6, 1))
        means = {"uniform": slopes[0] * GRID / 100, "dump_ucb": 1.5 * slopes[1] * GRID / 100}
        ratio = spent_to_baseline(means, GRID, "uniform", "dump_ucb")["dump_ucb"]["uniform"]
        assert ratio.low < ratio.value < ratio.high
        spread[noise] = ratio.high - ratio.low
    assert 0 < 2 * spread[0.02] < spread[0.1]


def finished(folder: Path, seed: int, gain: float) -> Measured:
    write_run(folder, 3, 20, seed, gain, tokens=100.0)
    [*_, (_, last)] = read_run(folder).validations
    rows = {f"kk_logic_{n}": {"accuracy": {"value": n / 10}} for n in (2, 3, 4)}
    sampled = {s: {"accuracy": {"value": last[f"val/{s}/accuracy"]}} for s in rows}
    modes = {"greedy": {"sources": rows}, "sampled": {"sources": sampled}}
    (folder / "evaluation.json").write_text(json.dumps({"files": {"validation": {"modes": modes}}}))
    return read(folder, seed)


def test_results_of_recorded_runs(tmp_path):
    runs = {
        arm: [finished(tmp_path / arm / str(seed), seed, gain) for seed in (1, 2, 3)]
        for arm, gain in (("uniform", 3.0), ("dump_ucb", 6.0))
    }
    assert runs["uniform"][0].tokens.tolist() == [0.0, 1000.0, 2000.0]
    results = gather(runs, budget=1500.0)
    at_the_end = [(run.accuracy[1] + run.accuracy[2]) / 2 for run in runs["dump_ucb"]]  # half-way between validations
    assert np.allclose(results.accuracy["dump_ucb"][:, -1], at_the_end)
    assert results.final("dump_ucb").mean == pytest.approx(np.mean(at_the_end))
    ends = [results.mean(arm)[:, -1] for arm in ("uniform", "dump_ucb")]
    assert results.ahead("dump_ucb").mean == pytest.approx(np.mean(ends[1] - ends[0]))
    assert results.worst("uniform")[1].mean == 0.0
    assert results.behind("dump_ucb") == []
    assert gather({"uniform": runs["dump_ucb"], "dump_ucb": runs["uniform"]}, 1500.0).behind("dump_ucb") != []
    assert results.final_greedy("uniform").mean == pytest.approx(0.3)
    assert results.spent["dump_ucb"]["uniform"].high < 1
    with pytest.raises(ValueError, match="same seeds"):
        gather({**runs, "sec": runs["uniform"][:2]}, 1500.0)


@pytest.mark.parametrize("arm", all_arms(30).values(), ids=lambda arm: arm.name)
def test_every_arm_draws(arm):
    blocks = {"sources": {"name": "uniform"}, "prompts": {"name": "epoch"}, "budget": {"name": "fixed"}}
    blocks |= {key: yaml.safe_load(value) for key, value in arm.curriculum.items()}
    draw = Curriculum(["a", "b", "c"] * 20, 8, 4, 0, blocks, "", max_steps=1000).draw(0)
    assert draw.rollouts.sum() == 32


@pytest.mark.slow
def test_a_benchmark_runs_and_goes_on(tmp_path):
    """Called again after an interruption: finished runs stay as they are, and the result is the same."""
    out = tmp_path / "bench"
    command = [sys.executable, str(REPO / "tools/benchmark_convergence.py"), "--quick", "--out", str(out)]
    model = f"pretrained_checkpoint.restore_from_path={REPO}/examples/models/kk-tiny"
    options = ["--arms", "dump_ucb", "--workers", "2", model]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    page, before = out.with_suffix(".md").read_text(), (out / "uniform/1/metrics.jsonl").read_bytes()
    assert "| `dump_ucb` |" in page and "## By source" in page and out.with_suffix(".png").stat().st_size > 10_000
    tokens = [json.loads(line).get("perf/generated_tokens", 0) for line in before.splitlines()]
    assert sum(tokens) >= 8000 > sum(tokens) - tokens[-2]
    for name in ("evaluation.json", "outcome.json"):
        (out / "dump_ucb/1" / name).unlink()
    again = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and (out / "uniform/1/metrics.jsonl").read_bytes() == before
    assert out.with_suffix(".md").read_text() == page
    other = subprocess.run([*command, *options, "model.optim.lr=1e-3"], capture_output=True, text=True, timeout=600)
    assert other.returncode == 1 and "holds a run with other settings" in other.stderr
