"""A YAML as NeMo-Aligner's users have it trains, and as ours with the same meaning does, number by number."""

from __future__ import annotations

import pytest

from megatron_dump.assemble import build_trainer
from megatron_dump.inputs import load_tokenizer
from megatron_dump.rollout import Request
from tests.distributed.launch import RankFailed, run_ranks
from tests.distributed.runs import MODEL, SCRIPT, arguments, make_data, rows, train
from tests.nemo_aligner.style import FOLDER, OURS, WITHOUT

TOKENIZER = load_tokenizer(str(MODEL))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def _run(command) -> tuple[bool, int]:
    """Train; whether the validation is greedy, and its prompts."""
    trainer = build_trainer(SCRIPT.read_config(command)[1])
    trainer.resume()
    trainer.fit()
    trainer.close()
    return trainer.validator.generator.options.use_greedy, len(trainer.validation)


def _numbers(log_dir) -> list[dict]:
    """Metrics without those of clocks and memory."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("timing_s/", "perf/")) and key != "time"}
        for row in rows(log_dir)
    ]


def test_it_trains_as_the_same_in_our_keys(data, tmp_path):
    files = {split: data / f"{split}.parquet" for split in ("train", "test")}
    theirs = [
        f"--config-path={FOLDER}",
        "--config-name=style",
        *WITHOUT,
        f"pretrained_checkpoint.restore_from_path={MODEL}",
        f"model.data.data_prefix={{train: [{files['train']}], validation: [{files['test']}], test: [{files['test']}]}}",
        f"exp_manager.explicit_log_dir={tmp_path / 'theirs'}",
    ]
    settings = {
        **OURS,
        "pretrained_checkpoint.restore_from_path": MODEL,
        "model.data.train_files": f"[{files['train']}]",
        "model.data.validation_files": f"[{files['test']}]",
        "exp_manager.explicit_log_dir": tmp_path / "ours",
    }
    ours = ["--config-name=gpt_grpo", *(f"{key}={value}" for key, value in settings.items())]
    for command in (theirs, ours):
        assert run_ranks(_run, 1, command, timeout_s=300)[0] == (True, 6)
    logged, expected = _numbers(tmp_path / "theirs"), _numbers(tmp_path / "ours")
    assert logged == expected
    trained = [row for row in logged if "actor/lr" in row]
    assert [row["step"] for row in trained] == [1, 2, 3]  # an epoch: 120 rows, 40 a step
    assert trained[0]["actor/grad_norm"] > 0
    assert trained[-1]["actor/lr"] == pytest.approx(2e-5)  # cosine ended two optimizer steps before


def _stop_ids(command, ends) -> list[int]:
    words = ["trainer.grpo.inference_backend.reshard=false", f"model.grpo.sampling_params.end_strings={ends}"]
    trainer = build_trainer(SCRIPT.read_config([*command, *words])[1])
    trainer.close()
    return list(trainer.validator.generator.options.stop_ids)


def test_end_strings_are_tokens_that_end_a_completion(data, tmp_path):
    command = arguments(1, data, tmp_path)
    one, other = run_ranks(_stop_ids, 1, command, "['<|endoftext|>','</answer>']")[0]
    assert one == 0 and TOKENIZER.decode([other]) == "</answer>"
    with pytest.raises(RankFailed, match="end_strings='<.extra_id_1.>': it is no single token"):
        run_ranks(_stop_ids, 1, command, "['<|extra_id_1|>']")


def test_an_accelerator_that_is_not_there_is_refused(data, tmp_path):
    with pytest.raises(RankFailed, match="trainer.accelerator=gpu: the ranks use cpus here; none is visible, or set"):
        train(1, data, tmp_path, **{"trainer.accelerator": "gpu"})


def _two_seeds(command) -> list[bool]:
    """Whether a validation's and a training's completions are the same by another seed; on copies of the weights."""
    trainer = build_trainer(SCRIPT.read_config(command)[1])
    trainer.close()
    requests = [Request(i, trainer.dataset[i], 1) for i in range(8)]
    same = []
    for generator in (trainer.validator.generator, trainer.collector.generator.generator):
        texts = []
        for seed in (1, 2):
            generator.generator.seed = seed
            texts.append([completion.text for completion in generator.generate(0, requests)])
        same.append(texts[0] == texts[1])
    return same


def test_a_greedy_validation_leaves_training_sampled(data, tmp_path):
    overrides = {
        "trainer.grpo.greedy_on_validation": "true",
        "trainer.grpo.val_samples_per_prompt": 1,
        "trainer.grpo.inference_backend.reshard": "true",
    }
    assert run_ranks(_two_seeds, 1, arguments(1, data, tmp_path, **overrides))[0] == [True, False]
