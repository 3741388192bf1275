"""From YAML to a checked configuration, and what of it a resumed run must share."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megatron_dump.config.checks import validate
from megatron_dump.config.schema import Config, ConfigError


def load(raw: DictConfig) -> Config:
    """Check `raw` against the schema and return it typed. ConfigError for anything that cannot run."""
    schema = OmegaConf.structured(Config)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, raw))
    except ConfigKeyError as error:
        raise ConfigError(unknown_key(str(error.full_key))) from None
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: no value; set it in the YAML or as {error.full_key}=…") from None
    except OmegaConfBaseException as error:
        hint = "; give a list: [file.parquet]" if "ListConfig" in str(error) else ""
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}{hint}") from None
    assert isinstance(config, Config)
    validate(config)
    return config


_FREE_ON_RESUME = (  # how far, how fast and where a run goes; not what it computes
    "trainer.num_nodes trainer.devices trainer.collective_timeout_s trainer.grpo.max_steps "
    "trainer.grpo.val_check_interval trainer.grpo.val_samples_per_prompt trainer.grpo.save_interval "
    "trainer.grpo.run_validation_step_0 trainer.grpo.inference_backend trainer.grpo.curriculum "
    "model.tensor_model_parallel_size model.pipeline_model_parallel_size model.virtual_pipeline_model_parallel_size "
    "model.context_parallel_size model.expert_model_parallel_size model.expert_tensor_parallel_size "
    "model.sequence_parallel model.transformer_impl model.recompute_granularity model.recompute_method "
    "model.recompute_num_layers model.overlap_grad_reduce model.micro_batch_size model.share_prompts "
    "model.make_vocab_size_divisible_by model.dynamic_batching model.grpo.logprob_chunk_size "
    "model.grpo.forward_micro_batch_size model.grpo.offload_adam_states model.grpo.generation_rollout_mbs "
    "model.data.train_files "
    "model.data.validation_files model.data.max_prompt_length model.data.reward_workers exp_manager"
).split()


def lasting(config: Config) -> dict[str, Any]:
    """{dotted key: value} of everything a resumed run must share with the run it continues.

    Files are compared by what is in them (the curriculum's fingerprint), not by name; the curriculum compares its own
    settings, all defaults filled in.
    """
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in _FREE_ON_RESUME:
                continue
            if isinstance(value, dict):
                walk(value, f"{key}.")
            else:
                flat[key] = value

    walk(dataclasses.asdict(config), "")
    return flat


def refuse_changes(saved: dict[str, Any], here: dict[str, Any], new_sources: bool) -> list[str]:
    """ValueError if settings differ; with `new_sources` rewards may, for these need theirs: a line each."""
    notes = []
    for key in sorted(saved.keys() | here.keys()):
        if saved.get(key) == here.get(key):
            continue
        if new_sources and key.startswith("model.data.rewards."):
            notes.append(f"{key} was {saved.get(key)!r}, is {here.get(key)!r}")
            continue
        raise ValueError(
            f"{key}: the checkpoint has {saved.get(key)!r}, this run {here.get(key)!r}; set it back, or choose "
            "another exp_manager.explicit_log_dir"
        )
    return notes


def unknown_key(key: str) -> str:
    """One line for a key the schema does not have, naming the nearest it has."""
    known = _keys(OmegaConf.structured(Config))
    if key.lstrip("+") in known:
        return f"{key}: the key is there already; write it without +"
    leaf_matches = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = leaf_matches or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {key}{hint} (examples/conf/gpt_grpo.yaml lists every key)"


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in node:
        full = f"{prefix}{name}"
        keys.append(full)
        value = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(value, DictConfig):
            keys += _keys(value, full + ".")
    return keys
