"""A mixture of puzzles and sums, as tools/combine_datasets.py writes it, trains: each source by its own reward."""

from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_dump.inputs import load_tokenizer
from megatron_dump.rewards import reward_fn
from tests.distributed.runs import MODEL, REPO, draws, make_data, rows, train

sys.path.append(str(REPO / "tools"))

import combine_datasets

TOKENIZER = load_tokenizer(str(MODEL))
REWARD_OF = {"kk_logic_2": "kk", "kk_logic_3": "kk", "sums": "math"}
N_PROMPTS, GROUP = 6, 4
OVERRIDES = {
    "model.data.rewards": "{kk_*: kk, sums: math}",
    "model.data.max_prompt_length": 256,
    "trainer.grpo.curriculum.sources": "{name: uniform}",
    "trainer.grpo.num_prompts_per_grpo_step": N_PROMPTS,
    "trainer.grpo.samples_per_prompt": GROUP,
    "model.global_batch_size": N_PROMPTS * GROUP,
    "trainer.grpo.max_steps": 2,
}
BACKEND = "trainer.grpo.inference_backend"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with train.parquet: puzzles with 2 and 3 people, and sums in words that the model's tokenizer knows."""
    folder = tmp_path_factory.mktemp("mixture")
    make_data(folder / "kk")
    sums = [
        {"question": words.format(a, b), "answer": f"{a + b}"}
        for a, b in itertools.product(range(2, 7), repeat=2)
        if a + b <= 8
        for words in ("If {} and {} then :", "{} , and {} :")
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    assert not any(TOKENIZER.unk_token_id in encoded(row["question"]) for row in sums)
    words = [
        "--out",
        folder,
        "--only",
        "train",
        "--input",
        folder / "kk/train.parquet",
        "--input",
        folder / "sums.jsonl",
        "source=sums",
        "prompt=question",
        "answer=answer",
        "split=train",
        "--limit",
        "kk_logic_4",
        "train=0",
        "--limit",
        "*",
        "train=30",
        "--duplicates",
        "refuse",
        "--tokenizer",
        MODEL,
        "--max-prompt-length",
        "256",
        "--reward",
        "kk_*=kk",
        "sums=math",
    ]
    assert combine_datasets.main([*map(str, words)]) == 0
    return folder


def encoded(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def puzzles_and_sums(folder) -> list[tuple[str, str]]:
    """(source, ground truth) of every row."""
    table = pq.read_table(folder / "train.parquet").to_pylist()
    return [(row["data_source"], row["reward_model"]["ground_truth"]) for row in table]


def check(log_dir, data) -> list[dict]:
    """Both steps drew every source, by logged weights, and trained on finite numbers. Their metrics."""
    logged = rows(log_dir)
    assert [row["step"] for row in logged] == [1, 2]
    for row, draw in zip(logged, draws(log_dir), strict=True):
        assert {data[i][0] for i in draw["prompt_ids"]} == REWARD_OF.keys()
        weights = [row[f"curriculum/{source}/weight"] for source in REWARD_OF]
        assert weights == pytest.approx(draw["weights"]) and sum(weights) == pytest.approx(1)
        assert sum(row[f"curriculum/{source}/n_rollouts"] for source in REWARD_OF) == N_PROMPTS * GROUP
        assert all(math.isfinite(row[key]) for key in ("actor/loss", "actor/pg_loss", "actor/kl_loss"))
        assert 0 < row["actor/grad_norm"] < math.inf
    return logged


def test_a_mixture_generates_and_trains(mixture, tmp_path):
    """The logged rewards are those of each source's own function on the text that was generated for it."""
    recording, data = tmp_path / "rollouts", puzzles_and_sums(mixture)
    train(2, mixture, tmp_path, **OVERRIDES, **{f"{BACKEND}.record": recording})
    for row in check(tmp_path, data):
        rewards = {source: [] for source in REWARD_OF}
        files = [path.read_text() for path in recording.glob(f"step_{row['step'] - 1}_*.jsonl")]
        for made in map(json.loads, "".join(files).splitlines()):
            source, truth = data[made["prompt_id"]]
            text = TOKENIZER.decode(made["token_ids"][: len(made["token_ids"]) - made["finished"]])
            rewards[source].append(reward_fn(REWARD_OF[source])(text, truth).reward)
        for source, values in rewards.items():
            assert row[f"train/{source}/reward/mean"] == pytest.approx(np.mean(values)), source
        assert sum(map(len, rewards.values())) == N_PROMPTS * GROUP


def answer(source: str, truth: str, right: bool) -> str:
    if source == "sums":
        said = truth if right else str(int(truth) % 7 + 2)
    else:
        said = " ".join(json.loads(truth)["solution_text_format"].split())
        others, _, role = said.rpartition(" ")
        said = said if right else f"{others} {'knave' if role == 'knight' else 'knight'}"
    return f"<think> ok </think> <answer> {said} </answer>"


def test_a_mixture_trains_on_right_and_wrong_answers_of_both_kinds(mixture, tmp_path):
    """On answers that were written by hand, half of each group right: 3 and -0.5."""
    recording, data = tmp_path / "rollouts", puzzles_and_sums(mixture)
    made = []
    for (prompt, (source, truth)), sample in itertools.product(enumerate(data), range(GROUP)):
        ids = [*encoded(answer(source, truth, right=sample % 2 == 0)), TOKENIZER.eos_token_id]
        common = {"prompt_id": prompt, "sample": sample, "token_ids": ids, "logprobs": [-1.0] * len(ids)}
        made += [{**common, "group_id": g, "finished": True} for g in range(N_PROMPTS)]
    recording.mkdir()
    for step in (0, 1):
        lines = "".join(json.dumps({**row, "policy_version": step}) + "\n" for row in made)
        (recording / f"step_{step}_0_0.jsonl").write_text(lines)
    train(2, mixture, tmp_path, **OVERRIDES, **{f"{BACKEND}.type": "recorded", f"{BACKEND}.path": recording})
    for row in check(tmp_path, data):
        for source in REWARD_OF:
            assert row[f"train/{source}/reward/mean"] == pytest.approx(1.25)
            assert row[f"train/{source}/accuracy"] == 0.5
            assert row[f"curriculum/{source}/mean_abs_adv"] > 0.5
