"""The YAML schema: what it accepts, and the one line it answers to what it does not."""

from __future__ import annotations

import pathlib

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from megatron_dump import config as schema

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
CONF = EXAMPLES / "conf"
BACKEND = "trainer.grpo.inference_backend"
# examples/nemo_rl has NeMo-RL's own configuration, evaluate/ the block of examples/evaluate.py; gpt_grpo.yaml lacks
# what a recipe must say.
RECIPES = sorted(
    path
    for path in EXAMPLES.rglob("*.yaml")
    if not {"nemo_rl", "evaluate"} & {*path.parts} and path != CONF / "gpt_grpo.yaml"
)


def _compose(name: str, *overrides: str, folder: pathlib.Path = CONF):
    search = [] if folder == CONF else [f"hydra.searchpath=[file://{CONF}]"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(name, [*overrides, *search])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is(path):
    config = schema.load(_compose(path.stem, folder=path.parent))
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("--config-name=" in line or "make demo" in line for line in head), "no launch line"
    world = config.trainer.devices * config.trainer.num_nodes
    replica = config.model.tensor_model_parallel_size * config.model.pipeline_model_parallel_size
    assert world % replica == 0
    schema.check_world(config, world, world // replica)


def test_the_documented_defaults_are_the_defaults():
    """gpt_grpo.yaml lists every key of the schema with its default value."""
    documented = OmegaConf.to_container(_compose("gpt_grpo"))
    defaults = OmegaConf.to_container(OmegaConf.structured(schema.Config))
    assert documented == defaults


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.grpo.max_stepz=3", "unknown key trainer.grpo.max_stepz; did you mean trainer.grpo.max_steps?"),
        ("+model.lr=1", "unknown key model.lr; did you mean model.optim.lr?"),
        ("trainer.grpo.max_steps=many", "trainer.grpo.max_steps: Value 'many' of type 'str' could not be converted"),
        ("trainer.grpo.max_steps=0", "trainer.grpo.max_steps=0: must be above 0, or -1"),
        ("trainer.grpo.max_steps=-1", "trainer.grpo.max_steps=-1: all of trainer.grpo.max_epochs, which is null"),
        ("trainer.grpo.max_epochs=0", "trainer.grpo.max_epochs=0: must be above 0, or null"),
        ("trainer.grpo.max_generated_tokens=0", "trainer.grpo.max_generated_tokens=0: must be above 0, or null"),
        ("trainer.accelerator=tpu", "trainer.accelerator=tpu: known are auto, gpu, cpu"),
        ("trainer.grpo.greedy_on_validation=true", "trainer.grpo.val_samples_per_prompt=4: greedily decoded"),
        ("trainer.grpo.val_num_prompts_per_grpo_step=0", "trainer.grpo.val_num_prompts_per_grpo_step=0: must be"),
        ("model.optim.sched.constant_steps=-1", "model.optim.sched.constant_steps=-1: must not be negative"),
        (
            "model.optim.sched.constant_steps=20",
            "model.optim.sched.constant_steps=20: with warmup_steps=0 nothing of the run's 20 optimizer steps is left",
        ),
        ("trainer.precision=16", "trainer.precision=16: must be 32 or bf16"),
        ("trainer.grpo.samples_per_prompt=1", "trainer.grpo.samples_per_prompt=1: a group needs at least 2"),
        ("model.global_batch_size=96", "model.global_batch_size=96 does not divide the 256 rollouts of a step"),
        ("model.grpo.loss_agg_mode=mean", "model.grpo.loss_agg_mode=mean: known are token-mean, seq-mean-token-mean"),
        ("model.grpo.loss_mode=ppo", "model.grpo.loss_mode=ppo: known are vanilla, gspo, cispo"),
        ("trainer.grpo.advantage_estimator=gae", "trainer.grpo.advantage_estimator=gae: known are grpo, rloo"),
        ("trainer.grpo.kl_penalty_type=k4", "trainer.grpo.kl_penalty_type=k4: known are k1, k2, k3"),
        ("model.grpo.ratio_eps_low=1.5", "model.grpo.ratio_eps_low=1.5: must be in [0, 1]"),
        ("model.grpo.ratio_clip_c=1", "model.grpo.ratio_clip_c=1.0: must be above 1, or null"),
        ("model.grpo.importance_sampling_cap=0", "model.grpo.importance_sampling_cap=0.0: must be above 0, or null"),
        ("model.grpo.entropy_bonus=-1", "model.grpo.entropy_bonus=-1.0: must not be negative"),
        (
            ["model.grpo.loss_mode=cispo", "model.grpo.ratio_clip_c=3"],
            "model.grpo.ratio_clip_c=3.0: cispo knows no dua",
        ),
        (
            ["trainer.grpo.kl_in_reward=true", "trainer.grpo.initial_policy_kl_penalty=0"],
            "trainer.grpo.kl_in_reward=tr",
        ),
        ("trainer.grpo.curriculum.resume_changed=yes", "trainer.grpo.curriculum.resume_changed=yes: known are refuse"),
        (
            "trainer.grpo.inference_backend.type=sglang",
            "trainer.grpo.inference_backend.type=sglang: known are megatron",
        ),
        (
            "+trainer.grpo.inference_backend.vllm.dtype=half",
            "trainer.grpo.inference_backend.vllm.dtype: belongs to trainer.grpo.inference_backend.type=vllm",
        ),
        (
            ["trainer.grpo.inference_backend.type=vllm", "+trainer.grpo.inference_backend.vllm.python=/no"],
            "trainer.grpo.inference_backend.vllm.python=/no: no such program",
        ),
        (
            ["trainer.grpo.inference_backend.type=vllm", "+trainer.grpo.inference_backend.vllm.timeout_s=0"],
            "trainer.grpo.inference_backend.vllm.timeout_s=0: must be",
        ),
        (
            ["trainer.grpo.inference_backend.type=vllm", "+trainer.grpo.inference_backend.vllm.max_model_len=9"],
            "trainer.grpo.inference_backend.vllm.max_model_len=9: ",
        ),
        ("trainer.grpo.inference_backend.type=recorded", "trainer.grpo.inference_backend.path: no value"),
        ("model.data.train_files=x.parquet", "model.data.train_files: "),
        ("model.seed=-1", "model.seed=-1: must not be negative"),
        ("model.grpo.sampling_params.top_p=0", "model.grpo.sampling_params.top_p=0.0: must be above 0"),
        ("model.optim.betas=[0.9]", "model.optim.betas=[0.9]: must be two numbers in [0, 1)"),
        ("model.optim.sched.min_lr=1", "model.optim.sched.min_lr=1.0: must be in [0, model.optim.lr=0.0002]"),
        ("model.optim.name=sgd", "model.optim.name=sgd: only distributed_fused_adam is known"),
        ("model.data.train_files=[]", "model.data.train_files=[]: name at least one parquet file"),
        ("exp_manager.checkpoint_callback_params.mode=best", "exp_manager.checkpoint_callback_params.mode=best: known"),
        (
            "exp_manager.checkpoint_callback_params.save_top_k=0",
            "exp_manager.checkpoint_callback_params.save_top_k=0: must be at least 1",
        ),
        (f"{BACKEND}.pool.call_timeout_s=0", f"{BACKEND}.pool.call_timeout_s=0.0: must be a number of"),
        (f"{BACKEND}.ray.strategy=ALL", f"{BACKEND}.ray.strategy=ALL: one of PACK, SPREAD, "),
        (f"{BACKEND}.ray.cpus_per_engine=0", f"{BACKEND}.ray.cpus_per_engine=0.0: must be above 0"),
        (f"{BACKEND}.weight_sync.backend=mpi", f"{BACKEND}.weight_sync.backend=mpi: one of auto, "),
        ("exp_manager.explicit_log_dir=???", "exp_manager.explicit_log_dir: no value; set it"),
    ],
)
def test_errors_are_one_line_with_key_value_and_remedy(override, message):
    with pytest.raises(schema.ConfigError) as error:
        schema.load(_compose("kk_cpu", *([override] if isinstance(override, str) else override)))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_plus_is_asked_for_where_it_is_needed():
    there = "+trainer.grpo.max_steps: the key is in this YAML already; write it without +"
    assert schema.unknown_key("+trainer.grpo.max_steps") == there
    missing = "trainer.grpo.max_steps: the key is not in this YAML; write +trainer.grpo.max_steps=…"
    assert schema.unknown_key("trainer.grpo.max_steps") == missing


@pytest.mark.parametrize(
    ("override", "ranks", "message"),
    [
        ("model.global_batch_size=32", 3, "32 rollouts cannot be shared evenly by 3 data-parallel ranks: make it a mu"),
        ("model.micro_batch_size=48", 2, "model.micro_batch_size=48 does not divide the 128 rollouts"),
    ],
)
def test_data_parallel_ranks_get_equal_shares_and_whole_micro_batches(override, ranks, message):
    config = schema.load(_compose("kk_cpu", override))
    with pytest.raises(schema.ConfigError, match=message):
        schema.check_world(config, 8, ranks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.grpo.val_check_interval=4"], "must be a multiple of trainer.grpo.val_check_interval=4"),
        (["trainer.grpo.val_check_interval=0"], "must be a multiple of trainer.grpo.val_check_interval=0"),
        (["model.data.validation_files=[]"], "monitor=val/accuracy: name model.data.validation_files"),
    ],
)
def test_what_checkpoints_are_compared_by_is_measured_at_every_save(overrides, message):
    monitor = "exp_manager.checkpoint_callback_params.monitor=val/accuracy"
    raw = _compose("kk_cpu", monitor, "trainer.grpo.save_interval=10", "trainer.grpo.val_check_interval=5")
    schema.load(raw)
    with pytest.raises(schema.ConfigError, match=message.replace("[", r"\[")):
        schema.load(_compose("kk_cpu", monitor, "trainer.grpo.save_interval=10", *overrides))


def test_a_chosen_checkpoint_needs_leave_to_resume():
    with pytest.raises(schema.ConfigError, match="resume_from_checkpoint=x/step_1: exp_manager.resume_if_exists=false"):
        schema.load(
            _compose("kk_cpu", "exp_manager.resume_from_checkpoint=x/step_1", "exp_manager.resume_if_exists=false")
        )


def test_dynamic_micro_batches_need_no_even_shares_but_room_for_the_longest_rollout():
    overrides = ["model.global_batch_size=32", "model.dynamic_batching.enabled=true"]
    config = schema.load(_compose("kk_cpu", *overrides))
    schema.check_world(config, 8, 3)
    config.model.dynamic_batching.train_mb_tokens = 256
    schema.check_budget(config, 64)  # with max_length 192
    for key in ("train", "logprob"):
        config.model.dynamic_batching.train_mb_tokens = 263 if key == "train" else 264
        config.model.dynamic_batching.logprob_mb_tokens = 263
        with pytest.raises(schema.ConfigError, match=f"{key}_mb_tokens=263: .* 65 tokens, .* 264 tokens, padded"):
            schema.check_budget(config, 65)
    config.model.dynamic_batching.enabled = False
    schema.check_budget(config, 65)


@pytest.mark.parametrize(("steps", "epochs", "expected"), [(-1, 2, 15), (9, 2, 9), (99, 1, 7), (99, None, 99)])
def test_epochs_bound_the_steps(steps, epochs, expected):
    """Of 120 rows a step draws 16."""
    config = schema.load(_compose("kk_cpu"))
    config.trainer.grpo.max_steps, config.trainer.grpo.max_epochs = steps, epochs
    schema.bound_steps(config, 120)
    assert config.trainer.grpo.max_steps == expected


def test_an_epoch_shorter_than_a_step_is_an_error():
    config = schema.load(_compose("kk_cpu", "trainer.grpo.max_epochs=1"))
    with pytest.raises(schema.ConfigError, match="trainer.grpo.max_epochs=1: 15 rows .* less than a step's"):
        schema.bound_steps(config, 15)
