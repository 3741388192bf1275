"""The estimators of an evaluation against brute force, its block of the YAML, and the table of what it found."""

from __future__ import annotations

import collections
import importlib.util
import io
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from megatron_dump import config as schema
from megatron_dump import estimates
from megatron_dump.config.evaluate_schema import EvaluateConfig
from megatron_dump.evaluation import tabulate
from megatron_dump.evaluation_table import show
from megatron_dump.rewards import reward_fn
from megatron_dump.rewards.workers import Job, RewardPool
from megatron_dump.types import Outcomes

REPO = pathlib.Path(__file__).resolve().parents[2]


def _script():
    sys.path.append(str(REPO / "examples"))  # it imports its neighbour
    spec = importlib.util.spec_from_file_location("examples_evaluate", REPO / "examples/evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()
SAMPLES = st.lists(st.integers(-1, 3), min_size=1, max_size=8)  # -1: no answer; 0: the right one; others: wrong ones


@given(SAMPLES, st.integers(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(samples, k):
    k = min(k, len(samples))
    subsets = list(itertools.combinations(samples, k))
    expected = sum(0 in subset for subset in subsets) / len(subsets)
    found = estimates.pass_at_k(np.array([len(samples)]), np.array([samples.count(0)]), k)
    assert found == pytest.approx([expected], abs=1e-12)


@given(SAMPLES, st.integers(1, 8))
def test_majority_at_k_is_the_mean_over_all_subsets(samples, k):
    def won(subset) -> float:
        votes = collections.Counter(vote for vote in subset if vote >= 0)
        most = max(votes.values(), default=0)
        return (votes[0] == most) / sum(count == most for count in votes.values()) if votes[0] else 0.0

    k = min(k, len(samples))
    subsets = list(itertools.combinations(samples, k))
    wrong = tuple(sorted(count for vote, count in collections.Counter(samples).items() if vote > 0))
    found = estimates.majority_at_k(len(samples), samples.count(0), wrong, k)
    assert found == pytest.approx(sum(map(won, subsets)) / len(subsets), abs=1e-12)


def test_many_samples_do_not_overflow():
    assert estimates.majority_at_k(1000, 600, (200, 100), 501) == pytest.approx(1.0)
    assert estimates.majority_at_k(1000, 1, (1,) * 999, 1000) == pytest.approx(1e-3)
    assert estimates.pass_at_k(np.array([1000]), np.array([1]), 500) == pytest.approx([0.5])
    for estimate in (
        lambda: estimates.majority_at_k(2, 1, (), 3),
        lambda: estimates.pass_at_k(*np.ones((2, 1), int), 2),
    ):
        with pytest.raises(ValueError, match="needs at least"):
            estimate()


def test_the_bootstrap_has_the_spread_that_theory_gives():
    rng = np.random.default_rng(0)
    above, below = rng.normal(2.0, 1.0, (400, 1)), np.ones((400, 1))
    drawn = estimates.bootstrap(above, below, 2000, 7, "a")
    assert drawn.std() == pytest.approx(above.std() / math.sqrt(400), rel=0.06)
    low, high = estimates.interval(drawn[:, 0], 0.95)
    assert (low, high) == pytest.approx(above.mean() + np.array([-1.96, 1.96]) * above.std() / 20, abs=0.02)
    np.testing.assert_array_equal(drawn, estimates.bootstrap(above, below, 2000, 7, "a"))
    assert not np.array_equal(drawn, estimates.bootstrap(above, below, 2000, 7, "b"))
    whole, blocks = estimates._BLOCK, []
    try:
        estimates._BLOCK = 400 * 300  # in several blocks
        blocks = estimates.bootstrap(above, below, 2000, 7, "a")
    finally:
        estimates._BLOCK = whole
    assert blocks.shape == drawn.shape and blocks.std() == pytest.approx(drawn.std(), rel=0.1)


def outcomes(correct, source_ids, rewards=None, well_formed=None):
    """[prompts, samples] of 0 and 1."""
    correct = np.array(correct, bool)
    p, n = correct.shape
    flat = correct.reshape(-1)
    rows = np.repeat(np.arange(p), n)
    return Outcomes(
        0,
        rows,
        np.tile(np.arange(n), p),
        rows,
        np.repeat(source_ids, n),
        flat.astype(float) if rewards is None else np.array(rewards, float).reshape(-1),
        np.full(p * n, np.nan),
        flat,
        np.ones(p * n, bool) if well_formed is None else np.array(well_formed, bool).reshape(-1),
        np.arange(p * n),
        np.ones(p * n, bool),
        np.ones(p * n, bool),
        np.zeros(p * n, np.int64),
    )


def test_a_table_by_hand():
    """Two sources of one and two prompts, four samples each; one reward could not be judged."""
    correct = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    votes = np.array([[9, 5, 5, 6], [9, 8, 7, 0], [3, 3, 4, 0]])
    rewards = [[1, 0, 0, 0], [1, 1, math.nan, 0], [0, 0, 0, 0]]
    well_formed = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    found = tabulate(
        outcomes(correct, [0, 1, 1], rewards, well_formed),
        votes.reshape(-1),
        ["a", "b"],
        4,
        EvaluateConfig(k=[1, 2, 4], bootstrap_samples=200),
        (1,),
    )
    a, b = found["sources"]["a"], found["sources"]["b"]
    value = lambda row: {k: v["value"] for k, v in row.items() if isinstance(v, dict)}  # noqa: E731
    assert value(a) == pytest.approx(
        {
            "accuracy": 0.25,
            "pass@1": 0.25,
            "pass@2": 0.5,
            "pass@4": 1.0,
            "maj@1": 0.25,
            # of the six pairs three hold the right answer, and tie with a wrong one
            "maj@2": 0.25,
            "maj@4": 0.0,
            "reward": 0.25,
            "length": 1.5,
            "well_formed": 1.0,
            "finished": 1.0,
        }
    )
    assert b["accuracy"]["value"] == 0.25 and b["pass_rates"] == [0.5, 0.0] and b["prompts"] == 2
    assert b["reward"]["value"] == pytest.approx(2 / 7) and b["pass@4"]["value"] == 0.5
    # two right ones, however written, outvote one wrong one
    assert b["maj@4"]["value"] == 0.5
    assert found["mean"]["maj@4"]["value"] == 0.25
    assert (b["accuracy"]["low"], b["accuracy"]["high"]) == (0.0, 0.5)
    assert (a["accuracy"]["low"], a["accuracy"]["high"]) == (0.25, 0.25)  # one prompt has no spread
    json.dumps(found, allow_nan=False)


def test_without_answers_there_is_no_majority_and_greedy_has_no_k():
    none = np.zeros(4, np.int64)
    table = tabulate(outcomes([[1, 0], [1, 0]], [0, 0]), none, ["a"], 2, EvaluateConfig(bootstrap_samples=10), (1,))
    assert "maj@2" not in table["sources"]["a"] and "pass@2" in table["sources"]["a"]
    table = tabulate(outcomes([[1], [0]], [0, 0]), none[:2], ["a"], 1, EvaluateConfig(bootstrap_samples=10), (1,))
    assert "pass@1" not in table["sources"]["a"] and table["mean"]["accuracy"]["value"] == 0.5
    nothing = outcomes([[1], [0]], [0, 0], [[math.nan], [math.inf]])
    table = tabulate(nothing, none[:2], ["a"], 1, EvaluateConfig(bootstrap_samples=10), (1,))
    assert table["sources"]["a"]["reward"] == {"value": None, "low": None, "high": None}


TAGS = "<think>x</think><answer>{}</answer>"
PUZZLE = json.dumps({"solution_text_format": "(1) Zoey is a knave\n(2) Sam is a knight"})


@pytest.mark.parametrize(
    ("name", "truth", "same", "other"),
    [
        (
            "kk",
            PUZZLE,
            ["Sam: knave. Zoey: knight", "(1) Zoey is a knight\n(2) Sam is a knave"],
            "Zoey and Sam are knights",
        ),
        (
            "kk",
            PUZZLE,
            ["(1) Zoey is a knave (2) Sam is a knight", "Knights: Sam; Knaves: Zoey"],
            "Zoey and Sam are knights",
        ),
        ("math", "1/2", ["0.5", "\\frac{1}{2}", "$1/2$"], "2"),
        ("math", "7", ["3 x", "3x"], "4x"),
    ],
)
def test_equal_answers_are_equal_votes(name, truth, same, other):
    """Through reward processes too."""
    judge = reward_fn(name)
    said = [judge(TAGS.format(text), truth).answer for text in same]
    assert said[0] is not None and len(set(said)) == 1
    assert judge(TAGS.format(other), truth).answer not in (None, said[0])
    assert judge(TAGS.format("who knows?"), truth).answer is None and judge("no tags", truth).answer is None
    with RewardPool({"s": name}, ["s"], workers=1) as pool:
        scores, _ = pool.score_all([Job("s", TAGS.format(same[0]), truth), Job("s", "no tags", truth)])
    assert [score.answer for score in scores] == [said[0], None]


def test_the_documented_defaults_are_the_defaults():
    documented = OmegaConf.to_container(OmegaConf.load(REPO / "examples/conf/evaluate/default.yaml"))
    assert documented == OmegaConf.to_container(OmegaConf.structured(EvaluateConfig))
    assert EvaluateConfig().ks == [1, 2, 4, 8] and EvaluateConfig(samples_per_prompt=6).ks == [1, 2, 4, 6]


def read(*overrides: str):
    return script.read_config(["--config-name=kk_cpu", *overrides])


def test_a_recipe_with_the_block(tmp_path):
    config, wanted = read("evaluate.files=[a.parquet, b.parquet]", "model.seed=7", "evaluate.k=[1, 4]")
    assert wanted.files == ["a.parquet", "b.parquet"] and wanted.ks == [1, 4] and config.model.seed == 7
    # what only training needs may be missing; a run's own config.yaml is a recipe
    config, _ = script.read_config(["pretrained_checkpoint.restore_from_path=m", "evaluate.files=[a.parquet]"])
    assert config.exp_manager.explicit_log_dir == "results/evaluation"
    OmegaConf.save(OmegaConf.structured(read()[0]), tmp_path / "config.yaml")
    config, wanted = script.read_config([f"--config-path={tmp_path}", "--config-name=config", "evaluate.k=[2]"])
    assert config == read()[0] and wanted.k == [2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.sampels_per_prompt=3", r"unknown key evaluate\.sampels_per_prompt; did you mean evaluate\.samples"),
        ("+evaluate.file=[x]", r"unknown key evaluate\.file; did you mean evaluate\.files\?"),
        ("evaluate.modes=[argmax]", r"evaluate\.modes=\['argmax'\]: name greedy, sampled or both"),
        ("model.grpo.sampling_params.use_greedy=true", r"use_greedy=true leaves nothing to sample"),
        ("evaluate.k=[9]", r"evaluate\.k=\[9\]: 9 of evaluate\.samples_per_prompt=8 samples cannot be chosen"),
        ("evaluate.k=[]", r"evaluate\.k=\[\]: name at least one"),
        ("evaluate.confidence=95", r"evaluate\.confidence=95\.0: must be between 0 and 1"),
        ("evaluate.num_prompts=0", r"evaluate\.num_prompts=0: must be at least 1"),
        ("evaluate.files=[]", r"evaluate\.files=\[\]: no files"),
        ("evaluate.samples_per_prompt=many", r"evaluate\.samples_per_prompt: Value 'many'"),
        ("model.lrr=3", r"unknown key model\.lrr"),
    ],
)
def test_one_line_for_what_cannot_be_used(override, message):
    with pytest.raises(schema.ConfigError, match=message) as caught:
        read(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("width", "lines"), [(250, 3), (80, 33)])
def test_the_table_is_printed_in_full(width, lines):
    """Wide and narrow; what it shows is what the JSON has."""
    table = tabulate(
        outcomes([[1, 0], [1, 1], [0, 0]], [0, 0, 1]),
        np.arange(1, 7),
        ["s_10", "s_2"],
        2,
        EvaluateConfig(bootstrap_samples=50),
        (1,),
    )
    result = {"settings": {"confidence": 0.95}, "files": {"some.parquet": {"modes": {"sampled": table}}}}
    shown = io.StringIO()
    show(result, Console(file=shown, width=width))
    text = shown.getvalue()
    assert "some.parquet, sampled, with 95% intervals over prompts" in text and "…\n" not in text
    assert text.index("s_2") < text.index("s_10") < text.index("mean")
    for row in (*table["sources"].values(), table["mean"]):
        for metric in ("accuracy", "pass@2", "maj@2", "reward"):
            assert f"{row[metric]['value']:.3f} ({row[metric]['low']:.3f}…{row[metric]['high']:.3f})" in text
    assert max(map(len, text.splitlines()[1:])) <= width
