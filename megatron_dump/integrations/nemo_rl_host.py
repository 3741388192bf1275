"""What the curriculum must know of NeMo-RL: its signatures, its configuration and the places to hook in.

Read from NVIDIA-NeMo/RL v0.6.0 (5fb58893), v0.7.0 (81aa43dd) and its main branch of August 2026 (7ea279ab, which calls
itself 0.6.0: a version number does not tell, so the signatures are asked).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

FUNCTION = "megatron_dump.integrations.nemo_rl.curriculum_dataloader"  # for data.custom_dataloader
_GRPO, _SYNC = "nemo_rl.algorithms.grpo", "nemo_rl.algorithms.grpo_sync"
_COMMON = {
    f"{_GRPO}:dynamic_sampling": (
        "repeated_batch std baseline dynamic_sampling_num_gen_batches master_config timer batch_cache"
    ),
    "nemo_rl.data.dataloader:MultipleDataloaderWrapper.__init__": "expected_num_prompts data_config dataloaders",
    "nemo_rl.data.dataloader:MultipleDataloaderWrapper.set_records": "records",
    "nemo_rl.utils.checkpoint:CheckpointManager.init_tmp_checkpoint": "step training_info run_config",
    "nemo_rl.utils.checkpoint:CheckpointManager.get_latest_checkpoint_path": "",
    "nemo_rl.utils.logger:Logger.log_metrics": "metrics step prefix step_metric step_finished",
}
# Version -> callable -> its parameters, without self.
SIGNATURES: dict[str, dict[str, str]] = {
    "0.7": {**_COMMON, f"{_GRPO}:setup": "master_config tokenizer dataset val_dataset processor policy_factory"},
    "0.6": {**_COMMON, f"{_GRPO}:setup": "master_config tokenizer dataset val_dataset processor"},
}
SYNC_SIGNATURES = {
    f"{_SYNC}:calculate_baseline_and_std_per_prompt": "prompts rewards valid_mask leave_one_out_baseline std_rewards",
}
# Trainer -> the function that it must look up by this name, for only then a replacement is called.
CALLS = {f"{_GRPO}:grpo_train": "dynamic_sampling"}
SYNC_CALLS = {f"{_SYNC}:grpo_train_sync": "calculate_baseline_and_std_per_prompt"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of NeMo-RL's configuration, what decides the curriculum."""

    block: dict[str, Any]  # grpo.curriculum
    seed: int
    group_size: int  # rollouts of every prompt
    max_steps: int
    normalize: bool  # advantages are divided by their group's standard deviation
    leave_one_out: bool  # a rollout's baseline is the mean of the others in its group
    dynamic_sampling: bool  # groups of like rewards are replaced by further batches
    transfer_queue: bool  # grpo_train_sync trains, not grpo_train


def probe(transfer_queue: bool = False) -> None:
    """RuntimeError naming what differs, unless the installed NeMo-RL has the signatures of a version known here."""
    sync, calls = (SYNC_SIGNATURES, SYNC_CALLS) if transfer_queue else ({}, {})
    found = [_differences({**known, **sync}) for known in SIGNATURES.values()]
    wrong = min(found, key=len)  # from the version that is nearest
    for trainer, name in {**CALLS, **calls}.items():
        if (function := _find(trainer)) is None or name not in function.__code__.co_names:
            wrong.append(f"{trainer} does not call {name}")
    if wrong:
        version = importlib.import_module("nemo_rl.package_info").__version__
        raise RuntimeError(
            f"NeMo-RL {version} differs from {' and '.join(sorted(SIGNATURES))}, which the curriculum knows: "
            f"{'; '.join(wrong)}; install one of those versions"
        )


def _differences(expected: Mapping[str, str]) -> list[str]:
    """What the installed NeMo-RL has otherwise, a part of a sentence each."""
    wrong = []
    for name, parameters in expected.items():
        if (function := _find(name)) is None:
            wrong.append(f"{name} is missing")
            continue
        takes = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
        if takes != parameters.split():
            wrong.append(f"{name} takes ({', '.join(takes)}), expected ({', '.join(parameters.split())})")
    return wrong


def _find(name: str) -> Callable[..., Any] | None:
    module, _, path = name.partition(":")
    return functools.reduce(lambda owner, part: getattr(owner, part, None), path.split("."), _module(module))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # it is there, and something that it needs is not
            raise
        return None


def read_settings(master_config: Any, tasks: Collection[str]) -> Settings:
    """Settings of NeMo-RL's MasterConfig (0.6: a mapping; 0.7: a pydantic model) over the data sets' task names.

    ValueError, naming key, value and remedy, for a configuration that the curriculum cannot serve.
    """
    config = master_config if isinstance(master_config, Mapping) else master_config.model_dump()
    grpo, data = config["grpo"], config["data"]
    if (grpo.get("async_grpo") or {}).get("enabled"):
        raise ValueError(
            "grpo.async_grpo.enabled=true: batches are drawn before the outcomes they depend on; set false"
        )
    if config.get("async_rl") is not None:
        raise ValueError("async_rl: the single controller has no custom dataloader; start examples/run_grpo.py without")
    if not isinstance(grpo.get("curriculum"), Mapping):
        raise ValueError("grpo.curriculum: no such block; it needs at least `sources: {name: dump_ucb}`")
    if "source_key" in grpo["curriculum"]:
        raise ValueError(
            "grpo.curriculum.source_key: NeMo-RL's tasks, one an entry of data.train, are the sources; drop it"
        )
    if not data.get("use_multiple_dataloader"):
        raise ValueError("data.use_multiple_dataloader: must be true, for each file is a source of the curriculum")
    if data.get("custom_dataloader") != FUNCTION:
        raise ValueError(f"data.custom_dataloader: {data.get('custom_dataloader')!r} must be {FUNCTION}")
    _check_tasks(data["train"], tasks)
    estimator = grpo.get("adv_estimator") or {}
    return Settings(
        block=dict(grpo["curriculum"]),
        seed=grpo["seed"],
        group_size=grpo["num_generations_per_prompt"],
        max_steps=grpo["max_num_steps"],
        normalize=bool(estimator.get("normalize_rewards", grpo["normalize_rewards"])),
        leave_one_out=bool(grpo.get("use_leave_one_out_baseline", True)),
        dynamic_sampling=bool(grpo["use_dynamic_sampling"]),
        transfer_queue=bool((config.get("data_plane") or {}).get("enabled")),
    )


def _check_tasks(train: Any, tasks: Collection[str]) -> None:
    """NeMo-RL names a task after folder and file, up to the first dot: of two like names one silently disappears."""
    entries = [train] if isinstance(train, Mapping) else list(train)
    if len(entries) == len(tasks):
        return
    files = ", ".join(str(entry.get("data_path", entry.get("dataset_name"))) for entry in entries)
    raise ValueError(
        f"data.train: {len(entries)} data sets ({files}) became {len(tasks)} tasks ({', '.join(sorted(tasks))}): some "
        "have the same name, which is their folder and file name up to the first dot; rename a file or its folder"
    )


def before_dynamic_sampling(observe: Callable[[Mapping[str, Any], bool], None]) -> None:
    """Show `observe` what every call of grpo_train's dynamic_sampling is given, before it filters.

    observe(call, begins): the arguments by name; whether the training step begins with this batch.
    """
    module: Any = importlib.import_module(_GRPO)
    filtering = module.dynamic_sampling
    signature = inspect.signature(filtering)

    @functools.wraps(filtering)
    def dynamic_sampling(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        observe(call, call["dynamic_sampling_num_gen_batches"] == 1)
        return filtering(*args, **kwargs)

    module.dynamic_sampling = dynamic_sampling


def after_baselines(observe: Callable[[Any, Any, Any], None]) -> None:
    """Show `observe` rewards, baselines and standard deviations of grpo_train_sync's batches, before any filter."""
    module: Any = importlib.import_module(_SYNC)
    calculate = module.calculate_baseline_and_std_per_prompt
    signature = inspect.signature(calculate)

    @functools.wraps(calculate)
    def calculate_baseline_and_std_per_prompt(*args: Any, **kwargs: Any) -> Any:
        baseline, std = calculate(*args, **kwargs)
        observe(signature.bind(*args, **kwargs).arguments["rewards"], baseline, std)
        return baseline, std

    module.calculate_baseline_and_std_per_prompt = calculate_baseline_and_std_per_prompt
