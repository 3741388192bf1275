"""A stand-in for the parts of NeMo-RL that the curriculum meets. It is NOT NeMo-RL, which needs Python 3.13 and GPUs.

Written from NeMo-RL's interfaces as recorded in recorded_signatures/nemo_rl.json: the same names, parameters, order of
calls and contents of batches, and nothing else. Models are replaced by a function that rewards a prompt.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
import sys
import types

import torch
from hydra.utils import get_method
from torch.utils.data import DataLoader

GROUP, PROMPTS = 4, 8
FUNCTION = "megatron_dump.integrations.nemo_rl.curriculum_dataloader"
SIZES = {"math-easy": 40, "math-hard": 30, "kk-3": 20}


class Batch(collections.UserDict):
    """Columns of one length, tensors or lists (BatchedDataDict)."""

    @property
    def size(self):
        return len(next(iter(self.data.values())))

    def repeat_interleave(self, times):
        return Batch({k: _rows(v, [i for i in range(self.size) for _ in range(times)]) for k, v in self.items()})

    def select_indices(self, indices):
        return Batch({k: _rows(v, indices) for k, v in self.items()})


def _rows(column, indices):
    return column[torch.tensor(indices, dtype=torch.long)] if torch.is_tensor(column) else [column[i] for i in indices]


def rl_collate_fn(data_batch):
    names = ("message_log", "extra_env_info", "task_name", "idx")
    columns = {name: [datum[name] for datum in data_batch] for name in names}
    for name in ("length", "loss_multiplier"):
        columns[name] = torch.tensor([datum[name] for datum in data_batch])
    longest = torch.ones_like(columns["length"]) * columns["length"].max()
    return Batch(columns, batch_max_length=longest, stop_strings=[None] * len(data_batch))


class AllTaskProcessedDataset:
    """`dataset` has the rows as read from a file; an item is a prompt, tokenised."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, idx):
        row = self.dataset[idx]
        tokens = torch.tensor([list(SIZES).index(row["task_name"]), idx])
        return {
            "message_log": [{"role": "user", "content": row["messages"][0]["content"], "token_ids": tokens}],
            "length": 2,
            "extra_env_info": {"ground_truth": "1"},
            "loss_multiplier": 1.0,
            "idx": idx,
            "task_name": row["task_name"],
        }


class MultipleDataloaderWrapper:
    def __init__(self, expected_num_prompts, data_config, dataloaders):
        self.expected_num_prompts, self.data_config, self.dataloaders = expected_num_prompts, data_config, dataloaders
        self.data_iterators = {name: iter(loader) for name, loader in dataloaders.items()}
        self.custom_dataloader_func = get_method(data_config["custom_dataloader"])
        self.records = {}

    def __iter__(self):
        return self

    def __next__(self):
        batch, self.data_iterators = self.custom_dataloader_func(self.data_iterators, self.dataloaders, **self.records)
        assert len(batch["message_log"]) == self.expected_num_prompts
        self.records = {}
        return batch

    def set_records(self, records):
        self.records.update(records)


class CheckpointManager:
    def __init__(self, config):
        self.checkpoint_dir = pathlib.Path(config["checkpoint_dir"])

    def init_tmp_checkpoint(self, step, training_info, run_config=None):
        folder = self.checkpoint_dir / f"tmp_step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "training_info.json").write_text(json.dumps(dict(training_info)))
        return folder

    def finalize_checkpoint(self, checkpoint_path):
        os.rename(checkpoint_path, self.checkpoint_dir / checkpoint_path.name.removeprefix("tmp_"))

    def get_latest_checkpoint_path(self):
        names = [p.name for p in self.checkpoint_dir.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
        return str(self.checkpoint_dir / max(names, key=lambda name: int(name[5:]))) if names else None


class Logger:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step, prefix="", step_metric=None, step_finished=False):
        self.logged.append((step, dict(metrics)))


def calculate_baseline_and_std_per_prompt(prompts, rewards, valid_mask, leave_one_out_baseline=True, std_rewards=None):
    """Of the rollouts whose prompts have the same tokens; mean of the others, standard deviation with ddof 1."""
    baseline, std = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for prompt in torch.unique(prompts, dim=0):
        mine = torch.nonzero((prompts == prompt).all(1))[:, 0].tolist()
        for i in mine:
            others = rewards[[j for j in mine if j != i or not leave_one_out_baseline]]
            baseline[i], std[i] = others.mean(), others.std()
    return baseline, std


def dynamic_sampling(
    repeated_batch, std, baseline, dynamic_sampling_num_gen_batches, master_config, timer, batch_cache=None
):
    """Groups of like rewards are taken out; an incomplete batch waits in the cache for the next one."""
    grpo = master_config.grpo
    repeated_batch["baseline"], repeated_batch["std"] = baseline, std
    if not grpo["use_dynamic_sampling"]:
        return repeated_batch, True, batch_cache, {}
    kept = repeated_batch.select_indices(torch.nonzero(std != 0)[:, 0].tolist())
    cache = kept if batch_cache is None else Batch({k: _joined(batch_cache[k], kept[k]) for k in kept})
    complete = cache.size >= grpo["num_prompts_per_step"] * grpo["num_generations_per_prompt"]
    return cache, complete, None if complete else cache, {}


def _joined(first, second):
    return torch.cat([first, second]) if torch.is_tensor(first) else [*first, *second]


def _rollouts(batch, reward, draws):
    """Every prompt GROUP times, judged by reward(task name, idx, sample, number of the batch)."""
    repeated = batch.repeat_interleave(GROUP)
    names = zip(repeated["task_name"], repeated["idx"])
    values = [float(reward(task, idx, i % GROUP, draws)) for i, (task, idx) in enumerate(names)]
    repeated["total_reward"] = torch.tensor(values)
    repeated["truncated"] = torch.zeros(len(values), dtype=torch.bool)
    prompts = torch.stack([log[0]["token_ids"] for log in repeated["message_log"]])
    return repeated, prompts


def _save(checkpointer, wrapped_dataloader, step):
    folder = checkpointer.init_tmp_checkpoint(step, {"total_steps": step}, None)
    for name in wrapped_dataloader.dataloaders:
        (folder / f"train_dataloader_{name}.pt").write_bytes(b"")
    checkpointer.finalize_checkpoint(folder)


def grpo_train(wrapped_dataloader, checkpointer, grpo_save_state, master_config, reward, batches, seen, save_every):
    step, generated, cache, drawn = grpo_save_state["total_steps"], 0, None, 0
    for batch in wrapped_dataloader:
        seen.append(batch)
        repeated, prompts = _rollouts(batch, reward, drawn)
        generated, drawn = generated + 1, drawn + 1
        rewards = repeated["total_reward"]
        baseline, std = calculate_baseline_and_std_per_prompt(prompts, rewards, torch.ones_like(rewards))
        repeated, complete, cache, _ = dynamic_sampling(repeated, std, baseline, generated, master_config, None, cache)
        if not complete:
            continue
        step, generated, cache = step + 1, 0, None
        if save_every and step % save_every == 0:
            _save(checkpointer, wrapped_dataloader, step)
        if drawn >= batches:
            return


def grpo_train_sync(
    wrapped_dataloader, checkpointer, grpo_save_state, master_config, reward, batches, seen, save_every
):
    for drawn, batch in enumerate(wrapped_dataloader):
        step = grpo_save_state["total_steps"] + drawn + 1
        seen.append(batch)
        repeated, prompts = _rollouts(batch, reward, drawn)
        carry = Batch({"total_reward": repeated["total_reward"], "prompt_ids_for_adv": prompts})  # no task_name
        carry["baseline"], carry["std"] = calculate_baseline_and_std_per_prompt(
            carry["prompt_ids_for_adv"], carry["total_reward"], torch.ones_like(carry["total_reward"])
        )
        if save_every and step % save_every == 0:
            _save(checkpointer, wrapped_dataloader, step)
        if drawn + 1 >= batches:
            return


def setup(master_config, tokenizer, dataset, val_dataset, processor=None, policy_factory=None):
    """Of NeMo-RL's tuple, the parts that matter among others."""
    data = master_config.data
    loaders = {
        name: DataLoader(data_set, batch_size=data["num_prompts_per_dataloader"], collate_fn=rl_collate_fn)
        for name, data_set in dataset.items()
    }
    wrapper = MultipleDataloaderWrapper(master_config.grpo["num_prompts_per_step"], data, loaders)
    checkpointer = CheckpointManager(master_config.checkpointing)
    latest = checkpointer.get_latest_checkpoint_path()
    info = (
        {"total_steps": 0} if latest is None else json.loads((pathlib.Path(latest) / "training_info.json").read_text())
    )
    return None, None, wrapper, None, Logger(), checkpointer, info, master_config


class MasterConfig:
    """Attributes that are plain sections, as in 0.7."""

    def __init__(self, **sections):
        self.__dict__.update(sections)

    def model_dump(self):
        return dict(self.__dict__)


def master_config(folder, block, sections=None, **grpo):
    data = {
        "use_multiple_dataloader": True,
        "custom_dataloader": FUNCTION,
        "num_prompts_per_dataloader": 1,
        "train": [{"data_path": f"/data/{name.replace('-', '/')}.parquet"} for name in SIZES],
    }
    settings = {
        "num_prompts_per_step": PROMPTS,
        "num_generations_per_prompt": GROUP,
        "max_num_steps": 100,
        "seed": 42,
        "normalize_rewards": True,
        "use_dynamic_sampling": False,
        "async_grpo": {"enabled": False},
        "curriculum": block,
        **grpo,
    }
    parts = {"grpo": settings, "data": data, "data_plane": {"enabled": False}}
    for name, section in (sections or {}).items():
        parts[name] = {**parts.get(name, {}), **section} if isinstance(section, dict) else section
    return MasterConfig(**parts, checkpointing={"checkpoint_dir": str(folder)})


def datasets(sizes=SIZES):
    return {
        name: AllTaskProcessedDataset(
            [{"messages": [{"role": "user", "content": f"{name} {i}"}], "task_name": name} for i in range(n)]
        )
        for name, n in sizes.items()
    }


def modules(version="0.7.0"):
    """Name -> module, for sys.modules: fresh ones, as the curriculum replaces functions in them."""
    grpo, sync = (_module(f"nemo_rl.algorithms.{name}", globals()) for name in ("grpo", "grpo_sync"))
    for module, trainer in ((grpo, grpo_train), (sync, grpo_train_sync)):  # looks names up there, as the real one does
        setattr(module, trainer.__name__, types.FunctionType(trainer.__code__, module.__dict__))
    found = [
        grpo,
        sync,
        *(_module(name) for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.data", "nemo_rl.utils")),
        _module("nemo_rl.package_info", __version__=version),
        _module("nemo_rl.data.dataloader", MultipleDataloaderWrapper=MultipleDataloaderWrapper),
        _module("nemo_rl.utils.checkpoint", CheckpointManager=CheckpointManager),
        _module("nemo_rl.utils.logger", Logger=Logger),
    ]
    return {module.__name__: module for module in found}


def _module(name, names=None, **attributes):
    module = types.ModuleType(name)
    module.__dict__.update({k: v for k, v in (names or {}).items() if not k.startswith("__")}, **attributes)
    return module


def install_modules(monkeypatch, version="0.7.0"):
    for name in [name for name in sys.modules if name == "nemo_rl" or name.startswith("nemo_rl.")]:
        monkeypatch.delitem(sys.modules, name)
    found = modules(version)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found
