"""What a run reads before its ranks meet: layout, tokenizer, prompts, rewards; each rank can tell what is wrong."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
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
class PromptFiles:
    """Parquet files that make one data set."""

    paths: list[str]
    key: str  # of the configuration, for errors
    keep: int | None = None  # rows, taken from all sources alike; None: all
    keep_key: str = "trainer.grpo.val_num_prompts_per_grpo_step"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What training and an evaluation read, checked."""

    layout: Layout
    positions: int  # of the model: a prompt and its completion have no more tokens together
    tokenizer: PreTrainedTokenizerFast
    datasets: dict[str, PromptDataset]
    sources: list[str]  # of all data sets

    def check_lengths(self, max_length: int) -> dict[str, int]:
        """Tokenise every prompt: the longest one's tokens in each data set.

        ConfigError where such a prompt with a completion of `max_length` tokens exceeds the model's positions.
        """
        longest = {name: dataset.check_lengths() for name, dataset in self.datasets.items()}
        for name, tokens in longest.items():
            if tokens + max_length > self.positions:
                raise ConfigError(
                    f"model.grpo.length_params.max_length={max_length}: with the longest prompt of {name}, {tokens} "
                    f"tokens, it exceeds the model's {self.positions} positions; lower it"
                )
        return longest


@dataclasses.dataclass(frozen=True)
class TrainingInputs(Inputs):
    """What training reads."""

    curriculum: Curriculum  # over the rows of `train`

    @property
    def train(self) -> PromptDataset:
        return self.datasets["train"]

    @property
    def validation(self) -> PromptDataset | None:
        return self.datasets.get("validation")


def read_inputs(config: Config, files: Mapping[str, PromptFiles], *, on_any_ranks: bool = False) -> Inputs:
    """No collective. ValueError or FileNotFoundError, each one clear line, for input that cannot be used.

    files: those of each data set, by name; on_any_ranks: however many were started, where training wants those that
    are configured.
    """
    layout, _, arch = check_all(config, _world_size(), on_any_ranks)
    tokenizer = load_tokenizer(config.pretrained_checkpoint.restore_from_path)
    datasets = {name: _load(config, tokenizer, of_set) for name, of_set in files.items()}
    sources = sorted({source for dataset in datasets.values() for source in dataset.sources})
    reward_functions(config.model.data.rewards, sources)  # tells what is wrong with them
    return Inputs(layout, arch.hf.max_position_embeddings, tokenizer, datasets, sources)


def read_training_inputs(config: Config) -> TrainingInputs:
    """As read_inputs; the steps of `trainer.grpo.max_epochs` are counted, and the curriculum is made."""
    files = {"train": PromptFiles(config.model.data.train_files, "model.data.train_files")}
    if config.model.data.validation_files:
        files["validation"] = validation_files(config)
    inputs = read_inputs(config, files)
    train = inputs.datasets["train"]
    schema.bound_steps(config, len(train))
    _check_monitors(config, train, inputs.datasets.get("validation"))
    return TrainingInputs(**vars(inputs), curriculum=make_curriculum(config, train))


def validation_files(config: Config) -> PromptFiles:
    """Those of a run's validation."""
    data, rows = config.model.data, config.trainer.grpo.val_num_prompts_per_grpo_step
    return PromptFiles(data.validation_files, "model.data.validation_files", rows)


def checked_layout(config: Config) -> Layout:
    """How the ranks that were started are to split the model of config.json; what does not go together is refused."""
    return check_all(config, _world_size())[0]


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


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


def _load(config: Config, tokenizer: PreTrainedTokenizerFast, files: PromptFiles) -> PromptDataset:
    """Parquet files as prompts, chat template applied. ConfigError where a source would keep no row."""

    def encode(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    longest = config.model.data.max_prompt_length
    source_key = config.trainer.grpo.curriculum.source_key
    dataset = PromptDataset(files.paths, source_key, encode=encode, max_prompt_length=longest, key=files.key)
    if files.keep is not None:
        try:
            dataset.keep(files.keep)
        except ValueError as error:
            raise ConfigError(f"{files.keep_key}={files.keep}: {error}") from None
    return dataset


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
