"""What a run reads before its ranks meet: layout, tokenizer, prompts, rewards; each rank can tell what is wrong."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_dump import config as schema
from megatron_dump import evaluate
from megatron_dump.actor.layout import Layout, check_all
from megatron_dump.config import Config, ConfigError, CurriculumConfig
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.data import PromptDataset
from megatron_dump.rewards import reward_functions


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Read and checked."""

    tokenizer: PreTrainedTokenizerFast
    train: PromptDataset
    validation: PromptDataset | None
    sources: list[str]  # of both
    curriculum: Curriculum  # over `train`'s rows


def read_inputs(config: Config) -> Inputs:
    """No collective. ValueError or FileNotFoundError, each one clear line, for input that cannot be used."""
    data = config.model.data
    checked_layout(config)
    tokenizer = load_tokenizer(config.pretrained_checkpoint.restore_from_path)
    train = load_data(config, tokenizer, data.train_files, "model.data.train_files")
    schema.bound_steps(config, len(train))
    validation = None
    if data.validation_files:
        validation = load_data(config, tokenizer, data.validation_files, "model.data.validation_files")
        keep_prompts(validation, config.trainer.grpo.val_num_prompts_per_grpo_step)
    _check_monitors(config, train, validation)
    sources = sorted({*train.sources, *(validation.sources if validation else ())})
    reward_functions(data.rewards, sources)  # tells what is wrong with them
    return Inputs(tokenizer, train, validation, sources, make_curriculum(config, train))


def checked_layout(config: Config) -> Layout:
    """How the ranks that were started are to split the model of config.json; what does not go together is refused."""
    return check_all(config, int(os.environ.get("WORLD_SIZE", "1")))[0]


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer as its tokenizer.json says; AutoTokenizer may rebuild another one from the model type."""
    if not (pathlib.Path(path) / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"pretrained_checkpoint.restore_from_path={path}: no tokenizer.json there; give a Hugging Face model folder"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if not tokenizer.chat_template:
        raise ValueError(
            f"pretrained_checkpoint.restore_from_path={path}: its tokenizer has no chat template; "
            "add chat_template.jinja"
        )
    return tokenizer


def load_data(config: Config, tokenizer: PreTrainedTokenizerFast, files: list[str], key: str) -> PromptDataset:
    """Parquet files as prompts, chat template applied."""

    def encode(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    longest = config.model.data.max_prompt_length
    source_key = config.trainer.grpo.curriculum.source_key
    return PromptDataset(files, source_key, encode=encode, max_prompt_length=longest, key=key)


def make_curriculum(config: Config, train: PromptDataset) -> Curriculum:
    """Over the training data's rows."""
    grpo = config.trainer.grpo
    return Curriculum(
        train.source_of_rows,
        grpo.num_prompts_per_grpo_step,
        grpo.samples_per_prompt,
        config.model.seed,
        blocks_of(grpo.curriculum),
        train.fingerprint,
        max_steps=grpo.max_steps,
        max_staleness=grpo.max_staleness,
    )


def blocks_of(curriculum: CurriculumConfig) -> dict[str, Any]:
    """What the Curriculum is made of; the rest of the section concerns the data and the resume."""
    return {k: v for k, v in vars(curriculum).items() if k not in ("source_key", "resume_changed")}


def keep_prompts(
    dataset: PromptDataset, n: int | None, key: str = "trainer.grpo.val_num_prompts_per_grpo_step"
) -> None:
    """Keep n rows, None: all. ConfigError names `key` where a source would get none."""
    if n is not None:
        try:
            dataset.keep(n)
        except ValueError as error:
            raise ConfigError(f"{key}={n}: {error}") from None


def monitored(config: Config) -> tuple[str | None, str | None]:
    """The metrics that decide which checkpoints are the best, and when the run ends early; None: nothing asks."""
    manager = config.exp_manager
    best = manager.checkpoint_callback_params.monitor if config.trainer.grpo.save_interval else None
    return best, manager.early_stopping_callback_params.monitor if manager.create_early_stopping_callback else None


def _check_monitors(config: Config, train: PromptDataset, validation: PromptDataset | None) -> None:
    """What decides by a validation must be measured by it; other metrics are known in full after the first step."""
    sources = validation.sources if validation else ()
    known = evaluate.metric_names(sources, config.trainer.grpo.val_samples_per_prompt)
    blocks = ("checkpoint_callback_params", "early_stopping_callback_params")
    for block, monitor in zip(blocks, monitored(config), strict=True):
        kind, *rest = (monitor or "").split("/", 1)
        if kind == "val" and monitor not in known:
            raise ConfigError(f"exp_manager.{block}.monitor={monitor}: the validation measures {', '.join(known)}")
        is_of_source = kind in ("train", "curriculum") and "/" in "".join(rest)
        if is_of_source and not rest[0].startswith(tuple(f"{source}/" for source in train.sources)):
            raise ConfigError(
                f"exp_manager.{block}.monitor={monitor}: no such source; there are {', '.join(train.sources)}"
            )
