"""Rules for keys of NeMo-Aligner that take more than a word: those whose meaning depends on other keys."""

from __future__ import annotations

from typing import Any

from megatron_dump.config.foreign_keys import Rule, Settings, alike

_BACKEND = "trainer.grpo.inference_backend"


def _backend_type(value: Any, settings: Settings) -> dict[str, Any] | None:
    if settings(f"{_BACKEND}.enable") is False:  # NeMo-Aligner then generates on the training weights
        return {f"{_BACKEND}.type": "megatron"}
    return None if value in ("trt_llm", "trt_llm_pytorch", "sglang") else {f"{_BACKEND}.type": value}


def _longest_prompt(settings: Settings) -> int | None:
    """Tokens that encoder_seq_length and max_input_len leave to a prompt; None: neither is given."""
    whole, limits = settings("model.encoder_seq_length"), []
    if whole is not None:
        limits.append(int(whole) - int(settings("model.grpo.length_params.max_length")))
    limits += [int(limit) for limit in [settings(f"{_BACKEND}.max_input_len")] if limit is not None]
    return min(limits, default=None)


def _prompt_length(_: Any, settings: Settings) -> dict[str, Any] | None:
    """The least of what is given; our own key may say less."""
    try:
        limit, ours = _longest_prompt(settings), settings("model.data.max_prompt_length")
        if limit is None or (ours is not None and int(ours) <= limit):
            return {}
    except (TypeError, ValueError):  # one of them is no number
        return None
    return {"model.data.max_prompt_length": limit} if limit > 0 else None


def _data_prefix(value: Any, _: Settings) -> dict[str, Any] | None:
    """{train, validation, test}: parquet files, without weights; the test files are the validation's or none."""
    if value is None:
        return {}
    if not isinstance(value, dict) or value.keys() - {"train", "validation", "test"}:
        return None
    files = {split: names if isinstance(names, list) else [names] for split, names in value.items() if names}
    if not all(isinstance(name, str) and name.endswith(".parquet") for names in files.values() for name in names):
        return None
    train, validation = files.get("train", []), files.get("validation", [])
    if files.get("test", []) not in ([], validation):
        return None
    return {"model.data.train_files": train, "model.data.validation_files": validation}


def _exp_dir(value: Any, settings: Settings) -> dict[str, Any] | None:
    if value is None:
        return {}
    if settings("exp_manager.explicit_log_dir") is not None:
        return None
    return {"exp_manager.explicit_log_dir": f"{value}/{settings('exp_manager.name') or 'default'}"}


def _exp_name(value: Any, settings: Settings) -> dict[str, Any] | None:
    in_use = settings("exp_manager.exp_dir") is not None and settings("exp_manager.explicit_log_dir") is None
    return {} if value is None or in_use else None


def _peft(block: Any, _: Settings) -> dict[str, Any] | None:
    return {} if block is None or (isinstance(block, dict) and block.get("peft_scheme") in (None, "none")) else None


def _amp(value: Any, settings: Settings) -> dict[str, Any] | None:
    return {} if value is (settings("trainer.precision") == "bf16") else None


def _model_parallel(value: Any, settings: Settings) -> dict[str, Any] | None:
    tensor, pipeline = (settings(f"model.{kind}_model_parallel_size") for kind in ("tensor", "pipeline"))
    return {} if value is None or alike(value, tensor * pipeline) else None


BACKEND_TYPE = Rule(
    f"{_BACKEND}.type",
    _backend_type,
    "`vllm` is the same; with `enable: false` any is `megatron`",
    "known are megatron (the training weights), vllm and recorded",
)
BACKEND_ENABLED = Rule(
    f"{_BACKEND}.enable",
    lambda value, _: {} if isinstance(value, bool) else None,
    f"`false`: `{_BACKEND}.type: megatron`",
    "must be true or false",
)
MAX_INPUT_LEN = Rule(
    f"{_BACKEND}.max_input_len",
    _prompt_length,
    "`model.data.max_prompt_length`, the least of what is given; a longer prompt is an error",
    "must be a number of tokens that leaves some to the prompt",
)
ENCODER_LENGTH = Rule(
    "model.encoder_seq_length",
    _prompt_length,
    "`model.data.max_prompt_length`, less `model.grpo.length_params.max_length`",
    "must be a number of tokens, of which model.grpo.length_params.max_length leaves some to the prompt",
)
DATA_PREFIX = Rule(
    "model.data.data_prefix",
    _data_prefix,
    "`model.data.train_files` and `model.data.validation_files`, for parquet files; `test`: the validation's or none",
    "give lists of parquet files (tools/combine_datasets.py makes them) without weights, which are the curriculum's "
    "sources', and as test those of validation or none",
)
EXP_DIR = Rule(
    "exp_manager.exp_dir",
    _exp_dir,
    "with `name`: `exp_manager.explicit_log_dir`, where that is not given",
    "exp_manager.explicit_log_dir is given as well; remove one of them",
)
EXP_NAME = Rule(
    "exp_manager.name",
    _exp_name,
    "the folder in `exp_manager.exp_dir`",
    "it names a folder in exp_manager.exp_dir, which is not in use; remove it (a wandb run: "
    "exp_manager.wandb_logger_kwargs.name)",
)
AMP = Rule(
    "model.megatron_amp_O2",
    _amp,
    "accepted: `true` with `trainer.precision: bf16`, `false` with `32`",
    "bf16 weights always have fp32 masters in the optimizer, fp32 weights need none; set it to true with "
    "trainer.precision=bf16, to false with 32",
)
PEFT = Rule(
    "model.peft", _peft, "accepted: with `peft_scheme: none`", "all weights are trained: set peft_scheme to none"
)
MODEL_PARALLEL = Rule(
    "exp_manager.checkpoint_callback_params.model_parallel_size",
    _model_parallel,
    "accepted: the product of `model.tensor_model_parallel_size` and `model.pipeline_model_parallel_size`",
    "checkpoints load on any layout, so it is not used; set it to the product of the sizes or remove it",
)
