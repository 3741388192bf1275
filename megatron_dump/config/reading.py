"""From YAML to a checked configuration, and what of it a resumed run must share."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_dump.config import nemo_aligner
from megatron_dump.config.checks import validate
from megatron_dump.config.nemo_aligner_keys import RULES
from megatron_dump.config.resolvers import register_resolvers
from megatron_dump.config.schema import Config, ConfigError


def load(raw: DictConfig) -> Config:
    """Check `raw` against the schema and return it typed; NeMo-Aligner's keys are taken too (nemo_aligner.py).

    ConfigError for anything that cannot run: all keys that are unknown or refused at once, a line each.
    """
    register_resolvers()
    schema = OmegaConf.structured(Config)
    try:
        given = OmegaConf.to_container(raw, resolve=True)
        assert isinstance(given, dict)
        settings, problems = nemo_aligner.translate({str(key): value for key, value in given.items()})
        problems += [unknown_key(key) for key in _unknown(schema, settings)]
        if problems:
            head = [f"{len(problems)} keys cannot be used:"] if len(problems) > 1 else []
            raise ConfigError("\n  ".join([*head, *problems]))
        config = OmegaConf.to_object(OmegaConf.merge(schema, settings))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: no value; set it in the YAML or as {error.full_key}=…") from None
    except OmegaConfBaseException as error:
        hint = "; give a list: [file.parquet]" if "ListConfig" in str(error) else ""
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}{hint}") from None
    except ValueError as error:  # of options that check themselves
        raise ConfigError(str(error)) from None
    assert isinstance(config, Config)
    validate(config)
    return config


_FREE_ON_RESUME = (  # how far, how fast and where a run goes; not what it computes
    "trainer.num_nodes trainer.devices trainer.accelerator trainer.collective_timeout_s trainer.grpo.max_steps "
    "trainer.grpo.max_epochs trainer.grpo.max_generated_tokens trainer.grpo.greedy_on_validation "
    "trainer.grpo.val_num_prompts_per_grpo_step trainer.grpo.val_check_interval "
    "trainer.grpo.val_samples_per_prompt trainer.grpo.save_interval "
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
        there = "is in this YAML already; write it without +" if key.startswith("+") else "is not in this YAML; write"
        return f"{key}: the key {there}" + ("" if key.startswith("+") else f" +{key}=…")
    leaf_matches = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = leaf_matches or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {key}{hint} (examples/conf/gpt_grpo.yaml lists every key)"


def known_keys() -> frozenset[str]:
    """Every key that a YAML may have: the schema's and NeMo-Aligner's."""
    return frozenset([*_keys(OmegaConf.structured(Config)), *(rule.key for rule in RULES)])


def _unknown(schema: DictConfig, given: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of `given` that the schema has not; a block it leaves open may have any."""
    for name, value in given.items():
        if name not in set(schema):  # `in` alone denies keys without a value
            yield f"{prefix}{name}"
            continue
        block = None if OmegaConf.is_missing(schema, name) else schema[name]
        if isinstance(value, dict) and isinstance(block, DictConfig) and OmegaConf.get_type(block) is not dict:
            yield from _unknown(block, value, f"{prefix}{name}.")


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in node:
        full = f"{prefix}{name}"
        keys.append(full)
        value = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(value, DictConfig):
            keys += _keys(value, full + ".")
    return keys
