"""The decision log: its replay is exact, and another policy can be asked about it."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_dump.curriculum.codec import (
    outcomes_from_json,
)
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.curriculum.replay import Log, ReplayError, read_log, reweigh, verify
from megatron_dump.monitor import Monitor
from megatron_dump.types import Draw, Outcomes

REPO = Path(__file__).resolve().parents[2]
SOURCES = ["easy", "hard", "middle", "tiny"]  # sorted; "tiny" has fewer rows than a step has slots
ROWS = ["easy"] * 20 + ["hard"] * 30 + ["middle"] * 25 + ["tiny"] * 3 + ["easy"] * 10
CONFIG: dict[str, Any] = {"sources": {"name": "dump_ucb"}, "prompts": {"name": "epoch"}, "budget": {"name": "fixed"}}


def answer(curriculum: Curriculum, draw: Draw, rng: np.random.Generator, groups: np.ndarray | None = None) -> Outcomes:
    """Outcomes of a draw's groups (positions; None: all), with NaN and infinite rewards and late answers."""
    positions = np.arange(len(draw.prompt_ids)) if groups is None else groups
    at = np.repeat(positions, draw.rollouts[positions])
    source_ids = draw.source_ids[at]
    correct = rng.random(at.size) < np.array([0.9, 0.1, 0.5, 0.3])[source_ids]
    rewards = np.where(rng.random(at.size) < 0.03, rng.choice([np.nan, np.inf, -np.inf], at.size), correct)
    advantages = np.full(at.size, np.nan)
    for group in positions:
        mine = (at == group) & np.isfinite(rewards)
        values = rewards[mine]
        advantages[mine] = (values - values.mean()) / (values.std(ddof=1) + 1e-6) if values.size > 1 else 0.0
    group_ids = draw.first_group + at
    samples = np.concatenate([np.arange(n) for n in draw.rollouts[positions]])
    yes, ages = np.ones(at.size, bool), np.full(at.size, rng.integers(0, 1 + curriculum.max_staleness))
    outcomes = Outcomes(
        draw.step,
        group_ids,
        samples,
        draw.prompt_ids[at],
        source_ids,
        rewards,
        advantages,
        correct,
        rng.random(at.size) < 0.9,
        rng.integers(1, 99, at.size),
        yes,
        yes,
        ages,
    )
    kept = np.isfinite(rewards) & ~np.isin(group_ids, curriculum.filter.rejected(outcomes))
    return dataclasses.replace(outcomes, kept=kept & draw.train)


def train(curriculum: Curriculum, n_steps: int, rng: np.random.Generator) -> None:
    """Pre-rollouts, training rounds and refills, outcomes in two parts; as many steps ahead as are allowed."""
    late: list[list[Outcomes]] = []
    for step in range(curriculum.step, curriculum.step + n_steps):
        while not (draw := curriculum.draw(step)).train:
            curriculum.observe(answer(curriculum, draw, rng))
        parts = [answer(curriculum, draw, rng, half) for half in np.array_split(rng.permutation(len(draw.rollouts)), 2)]
        parts = [sort(part) for part in parts]
        rejected = np.sort(np.concatenate([curriculum.filter.rejected(part) for part in parts]))
        while rejected.size and (refill := curriculum.refill(step, rejected)) is not None:
            parts.append(answer(curriculum, refill, rng))
            rejected = curriculum.filter.rejected(parts[-1])
        late.append(parts)
        for part in late.pop(0) if len(late) > curriculum.max_staleness else ():
            curriculum.observe(part)
    for part in (part for parts in late for part in parts):
        curriculum.observe(part)


def sort(outcomes: Outcomes) -> Outcomes:
    """In global order: by group id, then sample."""
    return outcomes.take(np.lexsort((outcomes.samples, outcomes.group_ids)))


def make(config: dict[str, Any], **options: Any) -> Curriculum:
    return Curriculum(ROWS, 8, 4, 7, {**CONFIG, **config}, "abc", max_steps=12, **options)


def run(log_dir: Path, config: dict[str, Any], n_steps: int = 12, **options: Any) -> Path:
    """Train and log as a trainer does; the path of curriculum.jsonl."""
    monitor, curriculum = Monitor(log_dir, SOURCES, n_steps, 0, {}), make(config, **options)
    monitor.log_curriculum({"step": 0, "event": "header", **curriculum.header()})
    curriculum.on_event = monitor.log_curriculum
    train(curriculum, n_steps, np.random.default_rng(5))
    return log_dir / "curriculum.jsonl"


CONFIGS = {
    "dump_ucb": {},
    "proportional": {"sources": {"name": "proportional"}},
    "static": {"sources": {"name": "static", "weights": {"easy": 1, "hard": 2, "middle": 3, "tiny": 1}}},
    "easy_to_hard": {"sources": {"name": "easy_to_hard", "order": ["tiny", "easy", "middle", "hard"]}},
    "sec": {"sources": {"name": "sec", "floor": 0.1}, "filter": {"name": "zero_variance", "max_refills": 2}},
    "robust and cures": {
        "sources": {"name": "dump_ucb_robust"},
        "prompts": {"name": "cures", "floor": 0.1},
        "budget": {"name": "neyman"},
        "audit": {"every": 4, "prompts": 2},
        "filter": {"name": "zero_variance", "max_refills": 1},
    },
    "pre-rollouts": {
        "prompts": {"name": "cures", "subsets": 3, "steps_per_subset": 4, "pre_rollouts": 2},
        "pass_rates": {"discount": 1.0, "prior": "flat"},
        "budget": {"name": "knapsack"},
    },
    "thompson": {"sources": {"name": "uniform"}, "prompts": {"name": "thompson"}},
    "own": {
        "sources": {"name": "tests.unit.own_policies:Struggling"},
        "prompts": {"name": "tests.unit.own_policies:LeastDrawn"},
        "budget": {"name": "tests.unit.own_policies:WrongShare"},
        "filter": {"name": "tests.unit.own_policies:NoneRight"},
    },
}


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_log_reproduces_bit_for_bit(tmp_path, config, max_staleness):
    log = read_log(run(tmp_path, config, max_staleness=max_staleness))
    told: list[tuple[int, int]] = []
    assert verify(log, lambda *counts: told.append(counts)) == 12
    assert told == [(i, len(log.events)) for i in range(len(log.events))]
    assert not log.truncated
    draws = [event for event in log.events if event["event"] == "draw"]
    assert any(event["rejected"] for event in draws) == ("filter" in config)
    assert any(not event["draw"]["train"] for event in draws) == ("subsets" in config.get("prompts", {}))


def test_a_resumed_run_goes_on_with_its_log(tmp_path):
    config = CONFIGS["robust and cures"]
    monitor, first = Monitor(tmp_path, SOURCES, 12, 0, {}), make(config)
    header = {"step": 0, "event": "header", **first.header()}
    monitor.log_curriculum(header)
    first.on_event = monitor.log_curriculum
    train(first, 5, np.random.default_rng(1))
    saved = json.dumps(first.state_dict())
    train(first, 2, np.random.default_rng(2))  # lost: the checkpoint is of step 5

    resumed = make(config)
    resumed.load_state_dict(json.loads(saved))
    again = Monitor(tmp_path, SOURCES, 12, 0, {})
    again.truncate_after(5)
    again.log_curriculum(header)  # said once more; harmless
    resumed.on_event = again.log_curriculum
    train(resumed, 4, np.random.default_rng(3))
    assert verify(read_log(tmp_path / "curriculum.jsonl")) == 9


def changed_run(log_dir: Path) -> Log:
    """Resumed after step 4 without "tiny", with a new source and another policy, as `resume_changed: allow` lets it."""
    monitor, first = Monitor(log_dir, SOURCES, 12, 0, {}), make({})
    monitor.log_curriculum({"step": 0, "event": "header", **first.header()})
    first.on_event = monitor.log_curriculum
    train(first, 4, np.random.default_rng(1))
    rows = ["new"] * 9 + [name for name in ROWS if name != "tiny"]
    second = Curriculum(rows, 8, 4, 7, {**CONFIG, "sources": {"name": "dump_ucb_robust"}}, "other", max_steps=12)
    assert second.load_state_dict(json.loads(json.dumps(first.state_dict())), allow_changes=True)
    monitor.log_curriculum({"step": 5, "event": "changed", "curriculum": second.state_dict(), **second.header()})
    second.on_event = monitor.log_curriculum
    train(second, 3, np.random.default_rng(2))
    return read_log(log_dir / "curriculum.jsonl")


def test_a_changed_resume_is_replayed_too(tmp_path):
    log = changed_run(tmp_path)
    assert verify(log) == 7
    assert log.policies == ["dump_ucb", "dump_ucb_robust"]
    wrong, event = tampered(log, "changed", 0)
    event["curriculum"]["step"] = 3
    with pytest.raises(ReplayError, match=r"step 5: curriculum\.step differs: the log has 3, the replay 4"):
        verify(wrong)


def test_another_policy_over_a_changed_resume(tmp_path):
    log = changed_run(tmp_path)
    assert log.sources == ["easy", "hard", "middle", "new", "tiny"]
    same = reweigh(log, {"name": "uniform"})
    quarter = np.full(5, 0.25)
    np.testing.assert_array_equal(same.weights[0], np.where(np.array(log.sources) == "new", 0, quarter))
    np.testing.assert_array_equal(same.weights[-1], np.where(np.array(log.sources) == "tiny", 0, quarter))
    np.testing.assert_allclose(same.logged.sum(axis=1), 1.0, atol=1e-12)
    ucb = reweigh(log, {"name": "dump_ucb"})
    np.testing.assert_array_equal(ucb.weights[:4], ucb.logged[:4])
    scores = ucb.scores["mean_abs_adv"]
    assert np.isnan(scores[:4, 3]).all() and np.isnan(scores[4:, 4]).all() and np.isnan(scores).sum() == 7
    observed = [outcomes_from_json(e["outcomes"]) for e in log.events if e["event"] == "observe" and e["step"] <= 4]
    sources, sizes = (np.concatenate([getattr(o, name) for o in observed]) for name in ("source_ids", "advantages"))
    known = [np.abs(sizes[(sources == k) & np.isfinite(sizes)]).mean() for k in range(3)]  # fewer than a window holds
    np.testing.assert_allclose(scores[4, :4], [*known, 0.0], atol=1e-12)  # carried over by name; "new" is new


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Log:
    path = run(tmp_path_factory.mktemp("run"), {"filter": {"name": "zero_variance", "max_refills": 1}})
    return read_log(path)


def tampered(log: Log, kind: str, n: int) -> tuple[Log, dict[str, Any]]:
    """A copy of the log, and its n-th event of a kind to change."""
    log = copy.deepcopy(log)
    return log, [event for event in log.events if event["event"] == kind][n]


def test_a_changed_prompt_is_found(log):
    changed, event = tampered(log, "draw", 3)
    event["draw"]["prompt_ids"][0] += 1
    with pytest.raises(ReplayError, match=r"draw\.prompt_ids\[0\] differs: the log has") as caught:
        verify(changed)
    assert (caught.value.step, caught.value.field) == (event["step"], "draw.prompt_ids[0]")


@pytest.mark.parametrize("part", ["weights", "scores"])
def test_the_last_bit_counts(log, part):
    changed, event = tampered(log, "draw", -1)
    values = event["draw"]["weights"] if part == "weights" else event["scores"]["ucb"]
    values[1] = float(np.nextafter(values[1], 2.0))
    with pytest.raises(ReplayError) as caught:
        verify(changed)
    assert caught.value.step == event["step"]
    assert caught.value.field == ("draw.weights[1]" if part == "weights" else "scores.ucb[1]")


def test_a_changed_outcome_shows_in_the_next_draw(log):
    changed, event = tampered(log, "observe", 0)
    event["outcomes"]["advantages"] = [v and 2 * v for v in event["outcomes"]["advantages"]]
    with pytest.raises(ReplayError) as caught:
        verify(changed)
    assert caught.value.step == 2


def test_a_missing_line_is_found(log):
    observed = next(i for i, event in enumerate(log.events) if event["event"] == "observe")
    shorter = dataclasses.replace(log, events=log.events[:observed] + log.events[observed + 1 :])
    with pytest.raises(ReplayError, match="step 2: draw cannot be replayed"):
        verify(shorter)


def test_another_version_or_option_is_found_before_any_draw(log):
    with pytest.raises(ReplayError, match=r"step 0: header\.version differs: the log has 99"):
        verify(dataclasses.replace(log, header={**log.header, "version": 99}))
    with pytest.raises(ValueError, match="no 'rows'"):
        verify(dataclasses.replace(log, header={k: v for k, v in log.header.items() if k != "rows"}))


def write(path: Path, log: Log, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in [log.header, *log.events]) + tail)
    return path


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path, log):
    line = json.dumps(log.events[-1])
    whole = dataclasses.replace(log, events=log.events[:-1])
    cut = read_log(write(tmp_path / "cut.jsonl", whole, line[: len(line) // 2]))
    assert cut.truncated and cut.events == log.events[:-1]
    unfinished = read_log(write(tmp_path / "unfinished.jsonl", whole, line))  # complete but for its line end
    assert not unfinished.truncated and unfinished.events == log.events


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (['{"step": 1, "prompt_ids": [3]}'], "no header line"),
        (["[1]"], "no header line"),
        (['{"step": 0, "event": "header"}', '{"st', '{"step": 1}'], "line 2 is not JSON"),
        (['{"step": 0, "event": "header"}', '{"step": 1, "event": "dance"}'], "line 2: event 'dance' is none of"),
        (['{"step": 0, "event": "header"}', '{"step": 7, "event": "header"}'], "line 2: another header"),
        (['{"step": 0, "event": "header"}', "3"], "line 2: 3 is no event"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, lines, message):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        read_log(path)


def test_the_same_policy_weighs_the_same(log):
    same = reweigh(log, {"name": "dump_ucb"})
    assert same.steps.tolist() == list(range(1, 13))
    assert np.array_equal(same.weights, same.logged)
    assert np.all(same.distance == 0)
    logged = [event for event in log.events if event["event"] == "draw" and event["rejected"] is None]
    assert same.scores["ucb"].tolist() == [event["scores"]["ucb"] for event in logged]


def test_another_policy_on_the_same_feedback(log):
    """SEC (arXiv 2505.14970) computed here from the log alone, once a step over the step's finite advantages."""
    other = reweigh(log, {"name": "sec", "alpha": 0.25, "temperature": 0.5})
    q = np.zeros(4)
    expected = []
    for step in range(1, 13):
        expected.append(np.exp(q / 0.5) / np.exp(q / 0.5).sum())
        outcomes = [outcomes_from_json(e["outcomes"]) for e in log.events if e["event"] == "observe"]
        outcomes = [o for o in outcomes if o.step == step - 1]
        sources = np.concatenate([o.source_ids for o in outcomes])
        sizes = np.abs(np.concatenate([o.advantages for o in outcomes]))
        for k in range(4):
            if (mine := sizes[(sources == k) & np.isfinite(sizes)]).size:
                q[k] = 0.25 * mine.mean() + 0.75 * q[k]
    np.testing.assert_allclose(other.weights, expected, atol=1e-12)
    np.testing.assert_allclose(other.distance, np.abs(other.logged - expected).sum(axis=1) / 2, atol=1e-12)
    assert np.array_equal(reweigh(log, {"name": "uniform"}).weights, np.full((12, 4), 0.25))


def test_sizes_and_length_of_the_run_reach_the_other_policy(log):
    sizes = np.array([30, 30, 25, 3])
    np.testing.assert_allclose(reweigh(log, {"name": "proportional"}).weights[5], sizes / sizes.sum(), atol=1e-12)
    schedule = reweigh(log, {"name": "easy_to_hard", "order": ["tiny", "easy", "middle", "hard"]}).weights
    assert schedule[0].argmax() == SOURCES.index("tiny") and schedule[-1].argmax() == SOURCES.index("hard")


def test_a_log_without_draws_cannot_be_weighed(log):
    with pytest.raises(ValueError, match="no training draw"):
        reweigh(dataclasses.replace(log, events=[]), {"name": "sec"})


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("replay_tool", REPO / "tools/replay.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_verifies_and_compares(tmp_path, log, tool, capsys):
    path = write(tmp_path / "curriculum.jsonl", log)
    assert tool.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 12 steps reproduce bit for bit\n"
    assert tool.main([str(path), "--policy", "static", "weights={easy: 0, hard: 0, middle: 0, tiny: 1}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    means = reweigh(log, {"name": "uniform"}).logged.mean(axis=0)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line and line.split()[0] in SOURCES}
    assert rows["tiny"] == [f"{means[3]:.3f}", "1.000", f"{1 - means[3]:+.3f}"]
    assert rows["easy"] == [f"{means[0]:.3f}", "0.000", f"{-means[0]:+.3f}"]
    assert f"total variation distance: mean {1 - means[3]:.3f}, at" in lines
    assert lines[-1] == f"picture: {tmp_path / 'replay_static.png'}"
    assert imread(tmp_path / "replay_static.png").shape[1] >= 1600


def test_many_sources_stay_legible(tmp_path, tool, capsys):
    names = [f"source_{i}" for i in range(40)]
    curriculum = Curriculum([n for n in names for _ in range(3)], 8, 4, 0, CONFIG, "abc")
    events: list[dict[str, Any]] = []
    curriculum.on_event = events.append
    curriculum.draw(0)
    path = write(tmp_path / "curriculum.jsonl", Log({"step": 0, "event": "header", **curriculum.header()}, events))
    assert tool.main([str(path), "--policy=proportional", "temperature=2", f"--out={tmp_path / 'x.png'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("source_") for line in lines) == 20
    assert "and 20 more sources, which differ less" in lines
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl"),
        (["LOG", "--policy", "secc"], "sources.name: 'secc' is unknown; known: "),
        (["LOG", "--policy", "sec", "alhpa=0.3"], "sources.alhpa: no such option"),
        (["LOG", "--policy", "sec", "alpha=high"], "sources.alpha: 'high' must be a number"),
        (["LOG", "--policy", "sec", "alpha"], "'alpha' is not key=value"),
        (["LOG", "--policy", "sec", "alpha={"], "'alpha={': the value is not YAML"),
        (["LOG", "alpha=0.3"], "name it with --policy"),
        (["LOG", "--out", "x.png"], "name the other with --policy"),
        (["LOG", "--policy", "sec", "--out", "no/such/folder/x.png"], "no/such/folder/x.png"),
        (["WRONG"], "step 12: draw.prompt_ids[0] differs"),
    ],
)
def test_errors_are_one_line(tmp_path, log, tool, capsys, arguments, message):
    wrong = copy.deepcopy(log)
    last = next(event for event in wrong.events if event["event"] == "draw" and event["step"] == 12)
    last["draw"]["prompt_ids"][0] += 1
    paths = {"LOG": write(tmp_path / "log.jsonl", log), "WRONG": write(tmp_path / "wrong.jsonl", wrong)}
    assert tool.main([str(paths.get(argument, argument)) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
