"""verl's own trainer class, data set, loader, agent-loop worker, TransferQueue, replay buffer and advantages on CPU.

What stands in is what needs a GPU: the engine (scripted rollouts) and the actor's weights (nothing is saved of them).
"""

from __future__ import annotations

import asyncio
import pathlib
from typing import Any

from tests.integrations.hosts import Log, rows

PROMPTS, GROUP, MAX_LENGTH = 4, 4, 6


def make_trainer(folder: pathlib.Path, model: str, n_rows: int = 40, *overrides: str) -> Any:
    """PPOTrainerCurriculum by verl's own configuration, tokenizer and loader; it logs into `trainer.log`."""
    import datasets
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.v1 import get_trainer_cls

    import megatron_dump.integrations.verl_trainer  # noqa: F401  what VERL_USE_EXTERNAL_MODULES imports

    folder.mkdir(exist_ok=True)
    path = str(folder / f"rows{n_rows}.parquet")
    datasets.Dataset.from_list(rows(n_rows)).to_parquet(path)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [
                f"data.train_files={path}",
                f"data.val_files={path}",
                f"data.train_batch_size={PROMPTS}",
                "data.dataloader_num_workers=0",
                "data.filter_overlong_prompts=True",
                "data.max_prompt_length=10",
                f"+data.cache_dir={folder}",
                f"data.max_response_length={MAX_LENGTH}",
                "data.seed=3",
                f"actor_rollout_ref.model.path={model}",
                f"actor_rollout_ref.rollout.n={GROUP}",
                "actor_rollout_ref.rollout.name=vllm",
                f"trainer.default_local_dir={folder}/checkpoints",
                "trainer.total_epochs=100",
                "trainer.v1.trainer_mode=curriculum",
                "algorithm.adv_estimator=grpo",
                "critic.enable=False",
                "+data.curriculum.sources.name=dump_ucb",
                "+data.curriculum.sources.window=64",
                "+data.curriculum.sources.exploration=0.0",
                "+data.curriculum.sources.temperature=0.2",
                *overrides,
            ],
        )
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config=config)
    trainer._init_tokenizer()
    trainer._init_dataloader()
    trainer.actor_rollout_wg = Weights()
    trainer._load_checkpoint()
    trainer.agent_loop_manager = AgentLoop(config)
    trainer.log = Log(trainer.curriculum.curriculum)
    return trainer


def train(trainer: Any, steps: int) -> list[dict[str, Any]]:
    """The parts of PPOTrainer.fit that a CPU can do, in its order; the metrics of each step."""
    import transfer_queue

    history = []
    for _ in range(steps):
        trainer.global_steps += 1
        metrics: dict[str, Any] = {}
        trainer.prepare_step()
        batch, _ = trainer.replay_buffer.sample(
            global_steps=trainer.global_steps, partition_id="train", batch_size=PROMPTS
        )
        batch = trainer._compute_advantage(batch, metrics)
        trainer._save_checkpoint()
        transfer_queue.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
        history.append(metrics)
    return history


def forget() -> None:
    """What was generated and not trained on, as a restart of verl would."""
    import transfer_queue

    for partition, keys in transfer_queue.kv_list().items():
        transfer_queue.kv_clear(keys=list(keys), partition_id=partition)


class Weights:
    """Of the actor: none."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...


class AgentLoop:
    """verl's agent-loop worker in this process, without Ray around it, on scripted completions."""

    def __init__(self, config: Any):
        from verl.trainer.ppo.v1 import AgentLoopWorkerTQ

        self.batches: list[dict[str, list[Any]]] = []  # what the loader gave, column by column
        loop = self

        class Worker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
            def __init__(self) -> None:
                self.config, self.background_tasks = config, set()

            async def _run_agent_loop(self, sampling_params, *, session_id, **prompt):
                await put_rollout(prompt, session_id, loop.lost)

        self._worker, self._events = Worker(), asyncio.new_event_loop()
        self.lost: set[tuple[int, int]] = set()  # (row, sample) whose rollout fails

    def generate_sequences(self, batch: Any) -> None:
        names = ("data_source", "extra_info", "uid", "__rollout_n__")
        self.batches.append({name: list(batch[name]) for name in names})
        self._events.run_until_complete(self._run(batch))

    async def _run(self, batch: Any) -> None:
        await self._worker.generate_sequences(batch)
        await asyncio.gather(*self._worker.background_tasks)


async def put_rollout(prompt: dict[str, Any], sample: int, lost: set[tuple[int, int]]) -> None:
    """One rollout of a prompt, as AgentLoopWorkerTQ writes it: row r's are worth 0 for `dull`, sample mod 2 else."""
    import torch
    import transfer_queue
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    row = prompt["extra_info"]["index"]
    if (row, sample) in lost:
        raise RuntimeError("the engine is gone")
    length = 1 + (row + sample) % MAX_LENGTH
    scores, mask = torch.zeros(length), torch.ones(length, dtype=torch.int64)
    scores[-1] = float(prompt["data_source"] == "lively") * (sample % 2)
    field = {
        "uid": prompt["uid"],
        "data_source": prompt["data_source"],
        "prompts": torch.ones(3, dtype=torch.int64),
        "responses": torch.ones(length, dtype=torch.int64),
        "response_mask": mask,
        "rm_scores": scores,
        "rollout_log_probs": torch.zeros(length),
        "old_log_probs": torch.zeros(length),
    }
    tag = {"status": "success", "prompt_len": 3, "response_len": length, "seq_len": 3 + length, "global_steps": 1}
    await transfer_queue.async_kv_batch_put(
        keys=[f"{prompt['uid']}_{sample}_0"],
        fields=list_of_dict_to_tensordict([field]),
        tags=[tag],
        partition_id="train",
    )
