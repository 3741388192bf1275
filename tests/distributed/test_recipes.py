"""Recipes of examples/conf on kk-tiny: their structure kept, everything in it smaller, two real steps."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pyarrow.parquet as pq
import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.runs import MODEL, REPO, make_data, one_rank, rows

sys.path.append(str(REPO / "tools"))

import combine_datasets

BACKEND = "trainer.grpo.inference_backend"
SMALL = {
    "pretrained_checkpoint.restore_from_path": MODEL,
    "trainer.precision": 32,
    "trainer.collective_timeout_s": 60,
    "trainer.grpo.max_steps": 2,
    "trainer.grpo.num_prompts_per_grpo_step": 8,
    "trainer.grpo.samples_per_prompt": 4,
    "model.make_vocab_size_divisible_by": 8,
    "model.grpo.length_params.max_length": 48,
    "model.data.max_prompt_length": 256,
    "model.data.reward_workers.workers": 0,
    "model.optim.lr": 2e-4,
}
TENSOR = {  # the 7B recipes: four updates a step; kk-tiny has two key/value heads
    "trainer.devices": 2,
    "model.tensor_model_parallel_size": 2,
    "model.dynamic_batching.train_mb_tokens": 1024,
    "model.global_batch_size": 8,
}
SHRUNK = {  # recipe -> (ranks, overrides besides SMALL)
    "kk_cpu": (8, {"model.global_batch_size": 32, "model.micro_batch_size": 8}),
    "kk_convergence": (1, {"model.global_batch_size": 32, "model.micro_batch_size": 8}),
    "kk_qwen2.5_7b_8gpu": (2, TENSOR),
    "kk_qwen2.5_7b_8gpu_uniform": (2, TENSOR),
    "kk_qwen2.5_7b_2node": (4, TENSOR),
    "math_mixture": (2, TENSOR),
    "cures_1.5b": (
        2,
        {
            "trainer.devices": 2,
            "model.dynamic_batching.train_mb_tokens": 1024,
            "model.global_batch_size": 32,
            # puzzles as its one source: kk-tiny solves some, and never boxes a result
            "trainer.grpo.curriculum.source_key": "ability",
            "trainer.grpo.curriculum.prompts.subsets": 4,
            "model.data.rewards.logic": "kk",
        },
    ),
}
WITH_VLLM = {"async_vllm"}  # tests/vllm/test_recipe.py


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("puzzles"))


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """GSM8K and AIME by years in name: sums in words that kk-tiny's tokenizer knows, by the recipe's own command."""
    folder = tmp_path_factory.mktemp("sums")
    command = ["--out", folder, "--duplicates", "refuse", "--reward", "gsm8k=math", "aime_*=math"]
    for name, words in (
        ("gsm8k", "If {} and {} then :"),
        ("aime_1983", "{} , and {} :"),
        ("aime_2000", "Is {} or {} :"),
    ):
        marked = "#### {}" if name == "gsm8k" else "{}"
        made = [
            {"question": words.format(a, b), "answer": marked.format(a + b)}
            for a, b in itertools.product(range(2, 7), repeat=2)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        after = ["answer_after=####"] if name == "gsm8k" else []
        command += [
            "--input",
            folder / f"{name}.jsonl",
            f"source={name}",
            "prompt=question",
            "answer=answer",
            *after,
            "split=0.2",
        ]
    assert combine_datasets.main([*map(str, command)]) == 0
    return folder


def test_every_recipe_is_run():
    there = {path.stem for path in (REPO / "examples/conf").glob("*.yaml")} - {"gpt_grpo"}
    assert there == SHRUNK.keys() | WITH_VLLM


def run(name, data, log_dir) -> list[dict]:
    world, overrides = SHRUNK[name]
    settings = {
        **SMALL,
        "model.data.train_files": f"[{data / 'train.parquet'}]",
        "model.data.validation_files": f"[{data / 'test.parquet'}]",
        "exp_manager.explicit_log_dir": log_dir,
        **overrides,
    }
    run_ranks(one_rank, world, [f"--config-name={name}", *(f"{k}={v}" for k, v in settings.items())], timeout_s=200)
    logged = [row for row in rows(log_dir) if "actor/loss" in row]
    assert [row["step"] for row in logged] == [1, 2]
    for row in logged:
        assert all(math.isfinite(row[key]) for key in ("actor/loss", "actor/grad_norm", "critic/rewards/mean"))
    assert max(row["actor/grad_norm"] for row in logged) > 0
    return logged


@pytest.mark.parametrize("name", [n for n in SHRUNK if n.startswith("kk_")])
def test_puzzles(puzzles, name, tmp_path):
    logged = run(name, puzzles, tmp_path)
    weights = [logged[1][f"curriculum/kk_logic_{n}/weight"] for n in (2, 3, 4)]
    assert sum(weights) == pytest.approx(1)
    assert (weights == pytest.approx([1 / 3] * 3)) == name.endswith("uniform")
    assert (tmp_path / "checkpoints/step_2").is_dir()


def test_a_mixture_is_judged_by_source(sums, tmp_path):
    logged = run("math_mixture", sums, tmp_path)
    sources = sorted({row["data_source"] for row in pq.read_table(sums / "train.parquet").to_pylist()})
    assert sources == ["aime_1983", "aime_2000", "gsm8k"]
    for source in sources:
        assert any(-3 <= row.get(f"train/{source}/reward/mean", math.nan) <= 3 for row in logged), source


def test_cures_generates_before_it_trains(puzzles, tmp_path):
    logged = run("cures_1.5b", puzzles, tmp_path)
    assert logged[0]["perf/generated_tokens"] > 2 * logged[1]["perf/generated_tokens"]  # 30 rows × 4, and 32
    assert logged[0]["curriculum/logic/n_rollouts"] == 32
