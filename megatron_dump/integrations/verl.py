"""The curriculum in verl's synchronous trainer (written for verl 0.9.1, `trainer.use_v1`):

    VERL_USE_EXTERNAL_MODULES=megatron_dump.integrations.verl_trainer python -m verl.trainer.main_ppo \
        trainer.v1.trainer_mode=curriculum data.dataloader_num_workers=0 '+data.curriculum.sources.name=dump_ucb' …

verl has no hook for a sampler of one's own, nor for its feedback, but trainers of one's own by name: this is its
synchronous one with another sampler in the loader (whose state verl keeps in data.pt), and with an ear for advantages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dump.integrations.columns import fingerprint_of, sources_of
from megatron_dump.integrations.hosted import HostedCurriculum
from megatron_dump.integrations.probe import require_signatures

MODE = "curriculum"  # trainer.v1.trainer_mode
_SIGNATURES = {
    "__init__": "config",
    "_init_dataloader": "",
    "_fetch_one_gen_batch": "",
    "_compute_advantage": "batch metrics",
    "_load_checkpoint": "",
    "_save_checkpoint": "",
}
_REFUSED = {  # key -> what may be there, why nothing else
    "data.dataloader_num_workers": (0, "loader processes read ahead of the feedback"),
    "algorithm.filter_groups.enable": (False, "filtered groups are replaced before anything is learned from them"),
    "trainer.v1.sampler.sync_refill_failed_groups": (False, "failed groups are replaced behind the curriculum's back"),
    "trainer.v1.sync.parameter_sync_step": (1, "feedback would come in parts of a step"),
}

_Base: Any = object
if TYPE_CHECKING:
    _Base = Any


class CurriculumSampler:
    """Rows of the data set, step by step: a torch Sampler with the curriculum's state as its own.

    One iteration is an epoch, `steps_per_epoch` steps. torchdata's StatefulDataLoader keeps the state, and a loader
    without workers asks for a step's first row only when the batch is fetched.
    """

    def __init__(self, curriculum: HostedCurriculum, steps_per_epoch: int):
        self.curriculum, self.steps_per_epoch = curriculum, steps_per_epoch
        self._labels: list[str] = []  # of the draw that is out, as far as they are known, by position

    def __len__(self) -> int:
        return self.steps_per_epoch * self.curriculum.curriculum.prompts_per_step

    def __iter__(self) -> Iterator[int]:
        while True:
            draw = self.curriculum.next_draw()
            self._labels = []
            yield from draw.prompt_ids.tolist()
            if (draw.step + 1) % self.steps_per_epoch == 0:
                return

    def label(self, labels: Sequence[str]) -> list[int]:
        """Names for the rows fetched last, in order; their group sizes."""
        assert self.curriculum.last is not None
        first = len(self._labels)
        self._labels += labels
        return self.curriculum.last.rollouts[first : first + len(labels)].tolist()

    def learn(
        self,
        labels: Sequence[str],  # of each rollout, the group's
        samples: Sequence[int],  # 0 .. G-1 in the group; one that does not come was lost
        rewards: np.ndarray,  # float [N], as the rest
        advantages: np.ndarray,
        lengths: np.ndarray,
        finished: np.ndarray,
    ) -> None:
        """Feedback on the step that is out. ValueError for rollouts of other prompts, or of none."""
        draw = self.curriculum.last
        place = {label: i for i, label in enumerate(self._labels)}
        if draw is None or len(place) != len(draw.prompt_ids) or not set(labels) <= place.keys():
            raise ValueError(f"{MODE}: feedback on {len(set(labels))} groups is not on the {len(place)} that are out")
        starts = np.cumsum(draw.rollouts) - draw.rollouts
        rows = np.array([starts[place[label]] for label in labels], np.int64) + np.asarray(samples, np.int64)
        n = int(draw.rollouts.sum())
        columns = np.full((4, n), np.nan)
        columns[:, rows] = rewards, advantages, lengths, finished
        lost = np.isnan(columns[2])
        self.curriculum.learn(columns[0], columns[1], np.where(lost, 0, columns[2]), ~lost & (columns[3] > 0))

    def state_dict(self) -> dict[str, Any]:
        return self.curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.curriculum.load_state_dict(state)


class CurriculumMixin(_Base):
    """Put before verl.trainer.ppo.v1.PPOTrainerSync in the bases of a class; verl_trainer.py does."""

    def __init__(self, config: Any):
        """config: verl's; `data.curriculum` is the block of HostedCurriculum. RuntimeError for another verl, ValueError
        for settings that read ahead or replace groups.
        """
        parent = super()
        found = {f"PPOTrainerSync.{name}": getattr(parent, name, None) for name in _SIGNATURES}
        require_signatures("verl", found, {f"PPOTrainerSync.{name}": value for name, value in _SIGNATURES.items()})
        check_config(config)
        config.trainer.v1.trainer_mode = "sync"  # what verl's own branches ask for
        super().__init__(config)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        data, loader, dataset = self.config.data, self.train_dataloader, self.train_dataset
        if not hasattr(dataset, "dataframe"):
            raise ValueError(f"data.custom_cls: {type(dataset).__name__} has no `dataframe`, as verl's RLHFDataset has")
        block = _plain(data.curriculum)
        source_key = block.get("source_key", data.reward_fn_key)
        self.curriculum = HostedCurriculum(
            block,
            sources_of(dataset.dataframe, source_key, "data.curriculum.source_key"),  # rows as verl's filter left them
            data.train_batch_size,
            self.config.actor_rollout_ref.rollout.n,
            data.get("seed") or 0,
            fingerprint_of(dataset.dataframe, [data.prompt_key, source_key]),
            key="data.curriculum",
            fixed_groups=False,
            max_steps=self.total_training_steps,
        )
        self.curriculum_sampler = CurriculumSampler(self.curriculum, self.steps_per_epoch)
        self.train_dataloader = type(loader)(
            dataset=dataset,
            batch_size=loader.batch_size,
            num_workers=0,
            drop_last=True,
            collate_fn=loader.collate_fn,
            sampler=self.curriculum_sampler,
        )

    def _fetch_one_gen_batch(self) -> Any:
        from verl.utils.tensordict_utils import assign_non_tensor_stack

        batch = super()._fetch_one_gen_batch()
        sizes = self.curriculum_sampler.label([str(uid) for uid in batch["uid"]])
        assign_non_tensor_stack(batch, "__rollout_n__", sizes)  # how often verl's agent loop samples each prompt
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        self.curriculum_sampler.learn(**_rollouts(batch, self.config.data.max_response_length))
        metrics.update(self.curriculum.metrics())
        return batch


def check_config(config: Any) -> None:
    """ValueError for settings under which feedback would come late or in parts, and for a missing block."""
    for key, (only, reason) in _REFUSED.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if value is not None else None
        if value is not None and value != only:
            raise ValueError(f"{key}={value}: {reason}; set it to {only}")
    if not config.data.get("curriculum"):
        raise ValueError("data.curriculum: missing; add +data.curriculum.sources.name=dump_ucb")


def _rollouts(batch: Any, max_length: int) -> dict[str, Any]:
    """The arguments of CurriculumSampler.learn, from what verl keeps in its TransferQueue; padding left out.

    Keys are {uid}_{session}_{index}: of a session with several outputs the last one counts, as in verl's advantages.
    """
    import transfer_queue

    final: dict[str, tuple[int, str]] = {}
    for key, tag in zip(batch.keys, batch.tags):
        session, _, index = key.rpartition("_")
        if not tag.get("is_padding", False) and int(index) >= final.get(session, (-1, ""))[0]:
            final[session] = int(index), key
    keys = [key for _, key in final.values()]
    fields = ["rm_scores", "advantages", "response_mask"]
    data = transfer_queue.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
    data = data.to_padded_tensor()
    mask = data["response_mask"].double()
    lengths = mask.sum(dim=1)
    advantages = (data["advantages"].double() * mask).sum(dim=1) / lengths.clamp(min=1)  # GRPO: the same at every token
    return {
        "labels": [session.rpartition("_")[0] for session in final],
        "samples": [int(session.rpartition("_")[2]) for session in final],
        "rewards": data["rm_scores"].double().sum(dim=1).numpy(),
        "advantages": advantages.numpy(),
        "lengths": lengths.numpy(),
        "finished": (lengths < max_length).numpy(),
    }


def _plain(block: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(block, resolve=True)  # pyright: ignore[reportReturnType]
