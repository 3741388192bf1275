"""A stand-in for NeMo-Aligner's trainers as the curriculum meets them. It is NOT NeMo-Aligner, which needs NeMo.

Written from the interfaces recorded in recorded_signatures/nemo_aligner.json: who builds loaders, draws, repeats,
slices by data-parallel rank and gathers, in the same order and under the same names. A function rewards
instead of a model.
"""

from __future__ import annotations

import collections
import types

import torch
import torch.distributed as dist

SOURCES = ["algebra"] * 24 + ["code"] * 16 + ["logic"] * 20
PROMPTS = 8


class Dataset:
    """Items as AllTaskDataset and RLHFDataset have them; every prompt has other tokens, and their number varies."""

    def __init__(self, sources=SOURCES):
        self.data = [{"task_name": source, "problem": f"problem {i}"} for i, source in enumerate(sources)]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, idx):
        tokens = torch.tensor([1 + idx // 8, 1 + idx % 8, *[3] * (idx % 3)])
        return {"text": tokens, "length": len(tokens), "idx": idx, "task_name": self.data[idx]["task_name"]}


def collate(data_batch):
    texts = torch.nn.utils.rnn.pad_sequence([item["text"] for item in data_batch], batch_first=True)
    lengths = torch.tensor([item["length"] for item in data_batch])
    return {"text": texts, "length": lengths, "idx": [item["idx"] for item in data_batch]}


class ParallelState:
    """Data-parallel ranks of `model_parallel` neighbouring ranks each."""

    def __init__(self, model_parallel=1):
        self.model_parallel = model_parallel

    def get_data_parallel_rank(self):
        return dist.get_rank() // self.model_parallel

    def get_data_parallel_world_size(self):
        return dist.get_world_size() // self.model_parallel

    def gather(self, local):
        """What every data-parallel rank has, in their order, on every rank."""
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, local)
        return [row for part in parts[dist.get_rank() % self.model_parallel :: self.model_parallel] for row in part]


class MegatronPretrainingRandomSampler:
    """NeMo's class by name only: the trainers ask whether a sampler is one."""

    def __init__(self):
        raise AssertionError("the curriculum's sampler is made, not this one")


class GRPOBatchIterator:
    def __init__(self, parallel_state):
        self.parallel_state = parallel_state

    def __call__(
        self, sampler_iter, micro_batch_size, samples_per_prompt, num_prompts_per_grpo_step, dataset, collate_fn
    ):
        """One call of next() on every rank; rollouts in blocks of ranks * micro_batch_size, a share for each rank."""
        rank, size = self.parallel_state.get_data_parallel_rank(), self.parallel_state.get_data_parallel_world_size()
        rollouts = [row for row in next(sampler_iter) for _ in range(samples_per_prompt)]
        assert len(rollouts) == num_prompts_per_grpo_step * samples_per_prompt
        for start in range(0, len(rollouts), size * micro_batch_size):
            block = rollouts[start : start + size * micro_batch_size]
            share = len(block) // size
            yield collate_fn([dataset[row] for row in block[rank * share : (rank + 1) * share]])


def default_batch_iterator(sampler_iter, num_microbatches, dataset, collate_fn):
    for _, rows in zip(range(num_microbatches), sampler_iter):
        yield collate_fn([dataset[row] for row in rows])


class Logger:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step=None, prefix=""):
        self.logged.append((step, {f"{prefix}{name}": value for name, value in metrics.items()}))


class _Trainer:
    def __init__(
        self,
        cfg,
        model,
        optimizer,
        scheduler,
        train_dataloader_builder,
        val_dataloader_builder,
        collate_fn,
        rollout_generator,
        batch_iterator_cls,
        logger,
        ckpt_callback,
        run_timer,
    ):
        self.cfg, self.model, self.logger, self.ckpt_callback = cfg, model, logger, ckpt_callback
        self.train_dataloader_builder, self.val_dataloader_builder = train_dataloader_builder, val_dataloader_builder
        self.collate_fn, self.batch_iterator_cls = collate_fn, batch_iterator_cls
        self.consumed_samples, self.step = 0, 0
        sampler = self.train_dataloader_builder(consumed_samples=0).batch_sampler
        if not isinstance(sampler, MegatronPretrainingRandomSampler) and cfg.max_epochs > 1:
            raise ValueError("max_epochs > 1 is not supported unless using MegatronPretrainingRandomSampler")
        assert sampler.drop_last
        self.num_steps_per_epoch = sampler.total_samples // sampler.global_batch_size
        self.generated = []  # rows that this rank rolled out, step by step

    def infer(self, batch):
        """One rollout of every prompt of the batch: its row, tokens with a response behind them, and lengths."""
        return [
            (row, [*text[:length].tolist(), 7, 7], int(length))
            for row, text, length in zip(batch["idx"], batch["text"], batch["length"])
        ]

    def gathered(self, local):
        """The rollouts of all ranks on every rank, judged: the n-th one of a row by model(row, n, step)."""
        self.generated.append([row for row, _, _ in local])
        rollouts = self.cfg.parallel_state.gather(local)
        count = collections.Counter()
        judged = []
        for row, _, _ in rollouts:
            judged.append(self.model(row, count[row], self.step))
            count[row] += 1
        tokens = [torch.tensor(tokens) for _, tokens, _ in rollouts]
        lengths = torch.tensor([length for _, _, length in rollouts])
        return {
            "idx": [row for row, _, _ in rollouts],
            "response_tokens": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True),
            "prompt_lengths": lengths,
            "response_lengths": lengths + 2,
            "rewards": torch.tensor([float(reward) for reward, _ in judged]),
            "is_end": torch.tensor([float(ended) for _, ended in judged]),
        }

    def state_dict(self):
        return {"step": self.step, "consumed_samples": self.consumed_samples}

    def load_state_dict(self, state_dict):
        self.step, self.consumed_samples = state_dict["step"], state_dict["consumed_samples"]

    def run_validation(self):
        self._run_inference(self.val_dataloader_builder, consumed_samples=0, is_validation=True)


class GRPOTrainer(_Trainer):
    def _run_inference(self, dataloader_builder, consumed_samples, is_validation=False):
        loader = dataloader_builder(consumed_samples=consumed_samples)
        iterator = self.batch_iterator_cls(
            sampler_iter=iter(loader.batch_sampler),
            micro_batch_size=self.cfg.generation_rollout_mbs,
            num_prompts_per_grpo_step=self.cfg.num_prompts_per_grpo_step,
            samples_per_prompt=self.cfg.samples_per_prompt,
            dataset=loader.dataset,
            collate_fn=self.collate_fn,
        )
        return self.gathered([rollout for batch in iterator for rollout in self.infer(batch)]), {}, {}

    def create_grpo_training_data_from_inferences(self, rollout_batch):
        return rollout_batch, {}

    def generate_rollouts(self):
        batch, _, _ = self._run_inference(self.train_dataloader_builder, self.consumed_samples, is_validation=False)
        self.create_grpo_training_data_from_inferences(batch)
        self.consumed_samples += self.cfg.num_prompts_per_grpo_step

    def fit(self, steps):
        for _ in range(steps):
            self.generate_rollouts()
            self.step += 1

    def save(self, extra_candidates=None, is_train_end=False, run_val=False):
        self.ckpt_callback(self.state_dict())


class ReinforceTrainer(_Trainer):
    repeats = "num_rollouts_per_prompt"

    def __init__(
        self,
        cfg,
        model,
        optimizer,
        scheduler,
        train_dataloader_builder,
        val_dataloader_builder,
        collate_fn,
        rm,
        batch_iterator_cls,
        logger,
        ckpt_callback,
        run_timer,
    ):
        super().__init__(
            cfg,
            model,
            optimizer,
            scheduler,
            train_dataloader_builder,
            val_dataloader_builder,
            collate_fn,
            rm,
            batch_iterator_cls,
            logger,
            ckpt_callback,
            run_timer,
        )

    def _run_inference(self, dataloader_builder, consumed_samples, is_validation):
        loader = dataloader_builder(consumed_samples=consumed_samples)
        sampler = loader.batch_sampler
        size = self.cfg.parallel_state.get_data_parallel_world_size()
        micro_batches = sampler.global_batch_size // sampler.micro_batch_size // size
        local = []
        for batch in self.batch_iterator_cls(iter(sampler), micro_batches, loader.dataset, self.collate_fn):
            for _ in range(1 if is_validation else self.cfg.get(self.repeats, 1)):
                local += self.infer(batch)
        batch = self.gathered(local)
        del batch["idx"]  # these trainers gather tensors only
        longest = batch["response_tokens"].shape[1]
        batch["values"] = torch.arange(len(batch["rewards"]) * longest).reshape(-1, longest) / 100.0
        return batch, self.compute_rollout_metrics(batch)

    def compute_rollout_metrics(self, rollout_batch):
        return {"rollout_size": rollout_batch["prompt_lengths"].size(0)}

    def generate_rollouts(self):
        batch, metrics = self._run_inference(self.train_dataloader_builder, self.consumed_samples, is_validation=False)
        self.consumed_samples += metrics["rollout_size"]
        return batch

    def fit(self, steps):
        for _ in range(steps):
            self.generate_rollouts()
            self.step += 1

    def save(self, extra_candidates=None, is_train_end=False):
        self.ckpt_callback(self.state_dict())


class PPOTrainer(ReinforceTrainer):
    repeats = "none"

    def __init__(
        self,
        cfg,
        model,
        optimizer,
        scheduler,
        train_dataloader_builder,
        val_dataloader_builder,
        collate_fn,
        rm_critic,
        batch_iterator_cls,
        logger,
        ckpt_callback,
        run_timer,
    ):
        super().__init__(
            cfg,
            model,
            optimizer,
            scheduler,
            train_dataloader_builder,
            val_dataloader_builder,
            collate_fn,
            rm_critic,
            batch_iterator_cls,
            logger,
            ckpt_callback,
            run_timer,
        )


class Config(types.SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)
