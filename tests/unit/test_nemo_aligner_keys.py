"""NeMo-Aligner's keys: used, or refused by name with the reason, and docs/configuration.md says which."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from megatron_dump import config as schema
from megatron_dump.config.nemo_aligner_keys import RULES, SAME
from tests.nemo_aligner.style import FOLDER, OURS, REFUSED, WITHOUT

REPO = pathlib.Path(__file__).resolve().parents[2]
CONF = REPO / "examples/conf"


def _style(*overrides: str):
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return compose("style", list(overrides))


def _ours(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("gpt_grpo", list(overrides))


def _nemo(name: str, *overrides: str):
    """A recipe of ours with keys of NeMo-Aligner's in it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [f"++{override}" for override in overrides])


def test_every_key_has_one_meaning_and_the_style_file_has_every_key():
    keys = [*SAME, *(rule.key for rule in RULES)]
    assert len(keys) == len(set(keys))
    raw = OmegaConf.to_container(_style())

    def missing(node, prefix=""):
        """Leaves that no key of the table covers; those found are struck off."""
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in keys:
                found.add(key)
            elif isinstance(value, dict):
                yield from missing(value, f"{key}.")
            else:
                yield key

    found: set[str] = set()
    assert list(missing(raw)) == []
    assert set(keys) - found == set()


def test_keys_of_the_same_name_are_in_the_schema():
    assert set(SAME) <= schema.known_keys() - {rule.key for rule in RULES}


def test_all_refused_keys_are_named_at_once_each_with_a_reason():
    with pytest.raises(schema.ConfigError) as error:
        schema.load(_style())
    first, *lines = str(error.value).splitlines()
    assert first == f"{len(REFUSED)} keys cannot be used:"
    named = [line.strip().split(": ", 1)[0].split("=")[0] for line in lines]
    assert sorted(named) == sorted(REFUSED)
    assert all(len(line.split(": ", 1)[1]) > 20 for line in lines)


def test_unknown_keys_stand_in_the_same_error():
    with pytest.raises(schema.ConfigError) as error:
        schema.load(_nemo("kk_cpu", "model.grpo.share_dir=x", "model.lr=1", "trainer.grpo.max_stepz=3"))
    first, *lines = str(error.value).splitlines()
    assert first == "3 keys cannot be used:"
    assert lines[0].startswith("  model.grpo.share_dir=x: engines get weights by")
    assert sorted(lines[1:]) == [
        "  unknown key model.lr; did you mean model.optim.lr? (examples/conf/gpt_grpo.yaml lists every key)",
        "  unknown key trainer.grpo.max_stepz; did you mean trainer.grpo.max_steps? (examples/conf/gpt_grpo.yaml lists "
        "every key)",
    ]


def test_the_rest_means_what_the_table_says():
    theirs = schema.load(_style(*WITHOUT))
    ours = schema.load(_ours(*(f"++{key}={value}" for key, value in OURS.items())))
    assert theirs.trainer.grpo.max_steps == -1 and theirs.trainer.grpo.max_epochs == 1
    schema.bound_steps(theirs, 120)  # rows, of which a step draws 40
    theirs.trainer.grpo.max_epochs = None
    assert dataclasses.asdict(theirs) == dataclasses.asdict(ours)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["trainer.grpo.use_leave_one_out_baseline=false"], "trainer.grpo.advantage_estimator", "grpo"),
        (["trainer.grpo.importance_sample_correct=false"], "model.grpo.importance_sampling_cap", None),
        (["trainer.grpo.generation_save_dir=x"], "trainer.grpo.inference_backend.record", "x"),
        (
            ["trainer.grpo.inference_backend.enable=false", "trainer.grpo.inference_backend.type=sglang"],
            "trainer.grpo.inference_backend.type",
            "megatron",
        ),
        (["model.encoder_seq_length=200"], "model.data.max_prompt_length", 8),  # less max_length, 192
        (
            ["model.encoder_seq_length=300", "trainer.grpo.inference_backend.max_input_len=50"],
            "model.data.max_prompt_length",
            50,
        ),
        (["model.encoder_seq_length=300", "model.data.max_prompt_length=7"], "model.data.max_prompt_length", 7),
        (
            ["exp_manager.explicit_log_dir=null", "exp_manager.exp_dir=a", "exp_manager.name=b"],
            "exp_manager.explicit_log_dir",
            "a/b",
        ),
        (["exp_manager.explicit_log_dir=null", "exp_manager.exp_dir=a"], "exp_manager.explicit_log_dir", "a/default"),
        (
            [
                "model.data.data_prefix={train: a.parquet}",
                "model.data.train_files=???",
                "model.data.validation_files=[]",
            ],
            "model.data.train_files",
            ["a.parquet"],
        ),
        (["model.megatron_amp_O2=true", "trainer.precision=bf16"], "trainer.precision", "bf16"),
        (["model.optim.sched.name=CosineAnnealing"], "model.optim.sched.name", "cosine"),
        (["model.optim.sched.name=linear"], "model.optim.sched.name", "linear"),
    ],
)
def test_a_key_becomes_ours(overrides, key, value):
    config = OmegaConf.structured(schema.load(_nemo("kk_cpu", *overrides)))
    assert OmegaConf.select(config, key) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.grpo.ratio_eps=0.3", "model.grpo.ratio_eps_high=0.4"],
            "model.grpo.ratio_eps=0.3 means model.grpo.ratio_eps_high=0.3, which is 0.4: remove one of them",
        ),
        (
            ["trainer.grpo.generation_rollout_mbs=8", "model.grpo.generation_rollout_mbs=4"],
            "trainer.grpo.generation_rollout_mbs=8 means model.grpo.generation_rollout_mbs=8, which is 4: remove one",
        ),
        (["trainer.grpo.model_gbs=1"], "trainer.grpo.model_gbs=1: set model.global_batch_size, and this to the same"),
        (["trainer.max_steps=7"], "trainer.max_steps=7: set trainer.grpo.max_steps, and this to the same"),
        (["model.precision=bf16"], "model.precision=bf16: set trainer.precision"),
        (["model.megatron_amp_O2=true"], "model.megatron_amp_O2=true: bf16 weights always have fp32 masters"),
        (["model.encoder_seq_length=192"], "model.encoder_seq_length=192: must be a number of tokens, of which"),
        (["model.encoder_seq_length=long"], "model.encoder_seq_length=long: must be a number of tokens"),
        (
            ["trainer.grpo.inference_backend.config.vllm={enable: true}"],
            "trainer.grpo.inference_backend.config.vllm: vLLM runs beside the ranks",
        ),
        (["trainer.grpo.batch_iterator={use_flask: true}"], "trainer.grpo.batch_iterator: rows are refilled"),
        (["trainer.grpo.environments={math: {}}"], "trainer.grpo.environments: no servers judge"),
        (["model.peft={peft_scheme: lora}"], "model.peft: all weights are trained"),
        (
            ["model.grpo.sampling_params.repetition_penalty=1.2"],
            "model.grpo.sampling_params.repetition_penalty=1.2: the loss needs the probabilities",
        ),
        (["model.data.data_prefix={train: [a.jsonl]}"], "model.data.data_prefix: give lists of parquet files"),
        (["model.data.data_prefix={train: [0.5, a.parquet]}"], "model.data.data_prefix: give lists of parquet files"),
        (["exp_manager.exp_dir=a"], "exp_manager.exp_dir=a: exp_manager.explicit_log_dir is given as well"),
        (["exp_manager.name=a"], "exp_manager.name=a: it names a folder in exp_manager.exp_dir"),
        (
            ["trainer.grpo.use_leave_one_out_baseline=maybe"],
            "trainer.grpo.use_leave_one_out_baseline=maybe: must be true or false",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(overrides, message):
    with pytest.raises(schema.ConfigError) as error:
        schema.load(_nemo("kk_cpu", *overrides))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_sums_in_yaml_files():
    sums = {"multiply": 12.0, "mul": 12.0, "int_div": 3.0, "div": 3.0, "subtract": 4.0}
    for name, value in sums.items():
        config = schema.load(_nemo("kk_cpu", f"trainer.grpo.gradient_clip_val=${{{name}:6,2}}"))
        assert config.trainer.grpo.gradient_clip_val == value


def test_a_sum_over_a_missing_key_is_an_error_in_one_line():
    raw = _nemo("kk_cpu")
    OmegaConf.update(raw, "model.global_batch_size", "${multiply:${model.size},2}")
    with pytest.raises(schema.ConfigError) as error:
        schema.load(raw)
    assert str(error.value).startswith("model.global_batch_size: ") and "model.size" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_documentation_lists_every_key():
    """The tables of docs/configuration.md, row by row."""
    text = (REPO / "docs/configuration.md").read_text()
    same = "| key | |\n|--|--|\n" + "".join(f"| `{key}` | {note} |\n" for key, note in SAME.items())
    rules = "| key | becomes | other values are refused: |\n|--|--|--|\n" + "".join(
        f"| `{rule.key}` | {rule.means or 'nothing: refused'} | {rule.refusal} |\n" for rule in RULES
    )
    assert same in text, f"docs/configuration.md should say:\n{same}"
    assert rules in text, f"docs/configuration.md should say:\n{rules}"
