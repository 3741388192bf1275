"""What stands for GPUs in grpo_train_sync: the toy policy, and the rollout actor in this process, on the real queue."""

from __future__ import annotations

from typing import Any

from nemo_rl.data_plane import build_data_plane_client
from nemo_rl.experience.sync_rollout_actor import SyncRolloutActor
from nemo_rl.models.policy.tq_policy import TQPolicy

from tests.nemo_rl import toys

_queue: list[Any] = []  # one for all runs of this process: its two Ray actors take long to start


class QueuePolicy(toys.Policy, TQPolicy):
    """In place of TQPolicy, whose queue it keeps: what its workers would compute is put there by this process."""

    def __init__(self, seen: list[Any], dies_at: int | None = None, *, dp_cfg: Any, **parts: Any):
        toys.Policy.__init__(self, seen, dies_at, **parts)
        self.dp_cfg, self.tq_partition_id, self._router_replay_enabled = dp_cfg, "train", False
        if not _queue:
            _queue.append(build_data_plane_client(dp_cfg, bootstrap=True))
        self.dp_client = _queue[0]

    def get_logprobs_from_meta(self, meta: Any, **options: Any) -> None:
        data = self.read_from_dataplane(meta, select_fields=["input_ids"])
        self.write_to_dataplane(meta, {"prev_logprobs": self.get_logprobs(data)["logprobs"]})

    def get_reference_policy_logprobs_from_meta(self, meta: Any, **options: Any) -> None:
        data = self.read_from_dataplane(meta, select_fields=["input_ids"])
        self.write_to_dataplane(meta, {"reference_policy_logprobs": self.get_logprobs(data)["logprobs"]})

    def train_from_meta(self, meta: Any, **options: Any) -> dict[str, Any]:
        data = self.read_from_dataplane(meta, select_fields=["input_ids", "token_mask", "advantages"])
        return self.train(data, None)

    def shutdown(self) -> None:
        """The next run has the same queue."""


class RolloutActor:
    """SyncRolloutActor in this process, where the toys' weights are."""

    def __init__(self, **parts: Any):
        actor = SyncRolloutActor.__ray_metadata__.modified_class(**parts)
        self.rollout_to_tq = toys.Remote(actor.rollout_to_tq)

    @classmethod
    def options(cls, **resources: Any) -> Any:
        return toys.Remote(cls, put=False)
