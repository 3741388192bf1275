"""Runs of NeMo-RL's own examples/run_grpo.py, in this process, through our run_grpo_curriculum.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import runpy
import shutil
import sys
from typing import Any

import pytest

from tests.integrations.hosts import TOKENIZER, Log
from tests.nemo_rl import toys

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "nemo_rl" / "run_grpo_curriculum.py"
FUNCTION = "megatron_dump.integrations.nemo_rl.curriculum_dataloader"
SIZES = {"dull": 24, "lively": 30, "lost": 16}
PROMPTS = 8  # of a step
# NeMo-RL's synchronous trainers -> how one asks for them
TRAINERS: dict[str, tuple[str, ...]] = {"grpo_train": ()}
if (pathlib.Path(os.environ.get("NEMO_RL_DIR", "")) / "nemo_rl" / "algorithms" / "grpo_sync.py").is_file():  # from v0.7
    TRAINERS["grpo_train_sync"] = (
        "data_plane.enabled=true",
        "data_plane.storage_capacity=1000",
        "data_plane.num_storage_units=1",
    )


def write_files(folder: pathlib.Path, sizes: dict[str, int] = SIZES) -> list[str]:
    """A file a source, in kk/: NeMo-RL calls them kk-dull, kk-lively, kk-lost."""
    (folder / "kk").mkdir(parents=True, exist_ok=True)
    paths = []
    for source, size in sizes.items():
        rows = [{"problem": toys.prompt(source, i), "answer": f"{source} {i}"} for i in range(size)]
        path = folder / "kk" / f"{source}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    return paths


def write_tokenizer(folder: pathlib.Path) -> str:
    """kk-tiny's, alone: beside its config.json transformers would take it for Qwen2's."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder / name)
    return str(folder)


def write_config(nemo_rl: pathlib.Path, folder: pathlib.Path, model: str, files: list[str]) -> str:
    """A configuration on top of NeMo-RL's own, as a user writes one. JSON is YAML."""
    block = {"sources": {"name": "dump_ucb", "temperature": 0.3}}
    data = {
        "_override_": True,
        "max_input_seq_length": 64,
        "shuffle": True,
        "num_workers": 0,
        "use_multiple_dataloader": True,
        "num_prompts_per_dataloader": 1,
        "custom_dataloader": FUNCTION,
        "train": [{"data_path": path} for path in files],
        "validation": [{"data_path": files[0]}],
        "default": {
            "dataset_name": "ResponseDataset",
            "input_key": "problem",
            "output_key": "answer",
            "prompt_file": None,
            "system_prompt_file": None,
            "processor": "math_hf_data_processor",
            "env_name": "toy",
        },
    }
    grpo = {
        "num_prompts_per_step": PROMPTS,
        "num_generations_per_prompt": toys.GROUP,
        "max_num_steps": 6,
        "val_period": 3,
        "val_at_start": True,
        "curriculum": block,
    }
    config = {
        "defaults": str(nemo_rl / "examples" / "configs" / "grpo_math_1B.yaml"),
        "grpo": grpo,
        "data": data,
        "env": {"_override_": True, "toy": {}},
        "policy": {"model_name": model, "max_total_sequence_length": 64, "train_global_batch_size": 32},
        "checkpointing": {"checkpoint_dir": str(folder / "checkpoints"), "save_period": 2, "metric_name": None},
        "logger": {"log_dir": str(folder / "logs"), "tensorboard_enabled": True, "monitor_gpus": False},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return str(path)


@dataclasses.dataclass
class Run:
    """What became of it."""

    folder: pathlib.Path
    log: Log  # of the curriculum
    batches: Any  # CurriculumBatches
    trained: list[Any]  # what the policy was trained on, a step each
    model: str  # folder of the tokenizer

    def trained_rows(self) -> list[list[tuple[str, int]]]:
        """[steps][rollouts]: (source, row), read from the tokens."""
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(self.model).convert_ids_to_tokens
        return [[toys.row_of(" ".join(words(ids[:4]))) for ids in data["input_ids"]] for data in self.trained]

    def logged(self) -> dict[str, list[tuple[int, float]]]:
        """Name -> (step, value), from the files of NeMo-RL's TensorBoard."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found: dict[str, list[tuple[int, float]]] = {}
        for path in (self.folder / "logs").rglob("events.*"):
            events = EventAccumulator(str(path)).Reload()
            for name in events.Tags()["scalars"]:
                found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
        return found

    def state(self, step: int) -> bytes:
        """curriculum.json of a checkpoint."""
        return (self.folder / "checkpoints" / f"step_{step}" / "curriculum.json").read_bytes()


class Host:
    """NeMo-RL with toys where it wants GPUs. Everything else is its own."""

    def __init__(self, checkout: pathlib.Path, folder: pathlib.Path):
        self._checkout, self._model = checkout, write_tokenizer(folder)

    def run(
        self, folder: pathlib.Path, *overrides: str, files: list[str] | None = None, dies_at: int | None = None
    ) -> Run:
        """Train as `python run_grpo_curriculum.py examples/run_grpo.py --config … overrides` does."""
        import nemo_rl.algorithms.grpo as grpo
        from nemo_rl.distributed import virtual_cluster
        from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
        from nemo_rl.environments.utils import ENV_REGISTRY

        from megatron_dump.integrations import nemo_rl as ours

        config = write_config(self._checkout, folder, self._model, files or write_files(folder))
        environment = "tests.nemo_rl.toys.Environment"
        trained: list[Any] = []
        attached: list[tuple[Log, Any]] = []

        def attach(*args: Any) -> Any:
            batches = real_attach(*args)
            attached.append((Log(batches.hosted.curriculum), batches))
            return batches

        real_attach = ours.attach
        script = str(self._checkout / "examples" / "run_grpo.py")
        with pytest.MonkeyPatch.context() as patch:
            for name in ("setup", "dynamic_sampling"):  # install and attach replace them: once a process, we run often
                patch.setattr(grpo, name, getattr(grpo, name))
            patch.setattr(grpo, "Policy", functools.partial(toys.Policy, trained, dies_at))
            patch.setattr(grpo, "VllmGeneration", toys.Generation)
            if "grpo_train_sync" in TRAINERS:
                _replace_in_sync(patch, trained, dies_at)
            patch.setattr(virtual_cluster, "init_ray", lambda: None)  # there is one
            patch.setitem(ENV_REGISTRY, "toy", {"actor_class_fqn": environment})
            patch.setitem(ACTOR_ENVIRONMENT_REGISTRY, environment, sys.executable)
            patch.setattr(ours, "attach", attach)
            patch.setattr(sys, "argv", [str(SCRIPT), script, "--config", config, *overrides])
            try:
                runpy.run_path(str(SCRIPT), run_name="__main__")
            except toys.Killed:
                assert dies_at is not None
        ((log, batches),) = attached
        return Run(folder, log, batches, trained, self._model)


def _replace_in_sync(patch: pytest.MonkeyPatch, trained: list[Any], dies_at: int | None) -> None:
    """The same for grpo_train_sync."""
    import nemo_rl.algorithms.grpo_sync as sync
    from nemo_rl.data_plane.adapters import transfer_queue
    from nemo_rl.models.policy import tq_policy

    from tests.nemo_rl import queue_toys

    name = "calculate_baseline_and_std_per_prompt"
    patch.setattr(sync, name, getattr(sync, name))  # attach replaces it
    patch.setattr(sync, "SyncRolloutActor", queue_toys.RolloutActor)
    patch.setattr(sync, "make_actor_runtime_env", lambda name: None)  # of an actor that is not started
    patch.setattr(tq_policy, "TQPolicy", functools.partial(queue_toys.QueuePolicy, trained, dies_at))
    # it would have Ray's workers install TransferQueue, which they have
    patch.setattr(transfer_queue, "_patch_tq_actor_runtime_env", lambda: None)
