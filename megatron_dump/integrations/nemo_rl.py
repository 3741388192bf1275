"""The curriculum in NeMo-RL's synchronous GRPO: grpo_train, and grpo_train_sync of its TransferQueue.

    data.use_multiple_dataloader: true
    data.custom_dataloader: megatron_dump.integrations.nemo_rl.curriculum_dataloader
    grpo.curriculum: {sources: {name: dump_ucb}}

and `install()` before NeMo-RL's own script (examples/nemo_rl/run_grpo_curriculum.py), or `attach` in a script of one's
own. docs/integrations/nemo_rl.md has the rest.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

from megatron_dump.integrations.nemo_rl_batches import CurriculumBatches
from megatron_dump.integrations.nemo_rl_host import (
    FUNCTION,
    after_baselines,
    before_dynamic_sampling,
    probe,
    read_settings,
)

_RECORD = "curriculum"  # what the wrapper of NeMo-RL's dataloaders hands on to the function


def curriculum_dataloader(data_iterators: dict[str, Any], dataloaders: dict[str, Any], **records: Any) -> Any:
    """(batch, iterators): the next step's prompts, chosen by the curriculum among those of all dataloaders.

    The signature is NeMo-RL's, which asserts that there are num_prompts_per_step rows. The curriculum comes as the
    record that `attach` sets, and sets again when a batch's outcomes have come. RuntimeError where it is missing.
    """
    batches = records.pop(_RECORD, None)
    if batches is None:
        raise RuntimeError(
            f"data.custom_dataloader={FUNCTION} has no curriculum: start with examples/nemo_rl/run_grpo_curriculum.py, "
            "or call attach() between NeMo-RL's setup and its trainer (or the last batch was not observed: "
            "NeMo-RL's asynchronous modes cannot have a curriculum)"
        )
    if records:
        raise ValueError(f"records {', '.join(sorted(records))}: the curriculum knows what to draw without them")
    return batches.next_batch(), data_iterators


def install() -> None:
    """Let every later `nemo_rl.algorithms.grpo.setup` attach the curriculum to what it returns.

    Call it before a script imports `setup`. RuntimeError, naming what differs, for a NeMo-RL that is not known here.
    """
    probe()
    grpo: Any = importlib.import_module("nemo_rl.algorithms.grpo")
    setup = grpo.setup
    signature = inspect.signature(setup)

    @functools.wraps(setup)
    def setup_with_curriculum(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        dataset = call["dataset"]
        settings = read_settings(call["master_config"], dataset if isinstance(dataset, dict) else ())
        probe(settings.transfer_queue)  # all of it before the models are loaded
        parts = setup(*args, **kwargs)
        attach(call["master_config"], *(_only(parts, name) for name in _PARTS))
        return parts

    grpo.setup = setup_with_curriculum


def attach(master_config: Any, dataloader: Any, checkpointer: Any, logger: Any) -> CurriculumBatches:
    """Put a curriculum into what NeMo-RL's `setup` returned, before the trainer is called; once a process.

    dataloader: MultipleDataloaderWrapper; checkpointer: CheckpointManager, whose latest checkpoint is continued;
    logger: Logger. ValueError for settings that do not fit, RuntimeError for a NeMo-RL that is not known here.
    """
    settings = read_settings(master_config, dataloader.dataloaders)
    probe(settings.transfer_queue)
    batches = CurriculumBatches(settings, dataloader.dataloaders, dataloader.expected_num_prompts)
    if (latest := checkpointer.get_latest_checkpoint_path()) is not None:
        batches.restore(latest)

    def observed(rewards: Any, baseline: Any, std: Any, batch: Any, begins: bool, log: bool = True) -> None:
        batches.observe(rewards, baseline, std, batch, begins)
        dataloader.set_records({_RECORD: batches})
        if log:
            logger.log_metrics(batches.hosted.metrics(), batches.steps)

    if settings.transfer_queue:  # it does not say which batch begins a step: without dynamic sampling each does
        every = not settings.dynamic_sampling
        after_baselines(lambda rewards, baseline, std: observed(rewards, baseline, std, {}, every, every))
    else:
        before_dynamic_sampling(
            lambda call, begins: observed(
                call["repeated_batch"]["total_reward"], call["baseline"], call["std"], call["repeated_batch"], begins
            )
        )
    _save_with(checkpointer, batches)
    dataloader.set_records({_RECORD: batches})
    return batches


_PARTS = (
    "nemo_rl.data.dataloader:MultipleDataloaderWrapper",
    "nemo_rl.utils.checkpoint:CheckpointManager",
    "nemo_rl.utils.logger:Logger",
)


def _only(parts: tuple[Any, ...], name: str) -> Any:
    """The one instance of a class among what `setup` returned: its length and order differ between versions."""
    module, _, kind = name.partition(":")
    found = [part for part in parts if isinstance(part, getattr(importlib.import_module(module), kind))]
    if len(found) != 1:
        raise RuntimeError(f"nemo_rl.algorithms.grpo.setup returned {len(found)} objects of {kind}, expected one")
    return found[0]


def _save_with(checkpointer: Any, batches: CurriculumBatches) -> None:
    """Every checkpoint gets the curriculum's state while its folder is still a temporary one."""
    begin = checkpointer.init_tmp_checkpoint

    @functools.wraps(begin)
    def init_tmp_checkpoint(*args: Any, **kwargs: Any) -> Any:
        folder = begin(*args, **kwargs)
        batches.save(folder)
        return folder

    checkpointer.init_tmp_checkpoint = init_tmp_checkpoint
