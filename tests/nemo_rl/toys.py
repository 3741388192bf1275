"""What stands for GPUs in NeMo-RL's loop: a policy whose only weight is how often it was trained, and its rollouts.

A prompt is "<source>: <name> <name>", whose names are the number of its row; an answer is one digit.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

SOURCES = ("dull", "lively", "lost")  # always right, sometimes, never
NAMES = ("Zoey", "Oliver", "Sam", "Amelia", "Liam", "Emma", "Noah", "Mia")
DIGITS = range(2, 9)  # words of kk-tiny's tokenizer, as the names are
GROUP = 4  # rollouts of a prompt


def prompt(source: str, row: int) -> str:
    return f"{SOURCES.index(source) + DIGITS[0]}: {NAMES[row // len(NAMES)]} {NAMES[row % len(NAMES)]}"


def row_of(text: str) -> tuple[str, int]:
    """(source, row) of a prompt, or of a text that begins with it."""
    digit, *names = text.replace(":", "").split()[:3]
    tens, ones = (NAMES.index(name) for name in names)
    return SOURCES[int(digit) - DIGITS[0]], tens * len(NAMES) + ones


def answer(sample: int, weights: int) -> int:
    """What rollout `sample` of a prompt answers, after `weights` steps of training."""
    return DIGITS[(sample + weights) % len(DIGITS)]


def reward(source: str, row: int, answered: int) -> float:
    return float(source == "dull" or (source == "lively" and (answered + row) % 3 == 0))


class Environment:
    """Judges in this process."""

    def __init__(self, config: Any):
        self.step, self.shutdown = Remote(self._step), Remote(lambda: True)

    @classmethod
    def options(cls, **resources: Any) -> Any:
        return Remote(cls, put=False)

    def _step(self, logs: list[Any], metadata: list[Any]) -> Any:
        import torch
        from nemo_rl.environments.interfaces import EnvironmentReturn

        rewards = []
        for log, told in zip(logs, metadata, strict=True):
            source, row = row_of(log[0]["content"])
            assert told["ground_truth"] == f"{source} {row}"  # the row's own
            rewards.append(reward(source, row, int(log[1]["content"])))
        n = len(rewards)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": "ok"}] * n,
            metadata=metadata,
            next_stop_strings=[None] * n,
            rewards=torch.tensor(rewards),
            terminateds=torch.ones(n),
            answers=None,
        )


class Remote:
    """`call` with the manners of a Ray actor's method: called at once, in this process."""

    def __init__(self, call: Any, put: bool = True):
        self._call, self._put = call, put

    def remote(self, *args: Any, **options: Any) -> Any:
        import ray

        result = self._call(*args, **options)
        return ray.put(result) if self._put else result


class Generation:
    """In place of VllmGeneration."""

    def __init__(self, cluster: Any, config: Any):
        from transformers import AutoTokenizer

        self.cfg, self._cluster, self._weights = config, cluster, None
        self._tokenizer = AutoTokenizer.from_pretrained(config["model_name"])

    def generate(self, data: Any, greedy: bool) -> Any:
        import torch
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        lengths = data["input_lengths"]
        n = len(lengths)
        ids = torch.cat([data["input_ids"], torch.full((n, 2), self._tokenizer.pad_token_id)], dim=1)
        for i, length in enumerate(lengths.tolist()):
            word = str(answer(i % GROUP, self._weights))
            ids[i, length : length + 2] = torch.tensor([*self._tokenizer.encode(word), self._tokenizer.eos_token_id])
        return BatchedDataDict(
            {
                "output_ids": ids,
                "generation_lengths": torch.full((n,), 2),
                "unpadded_sequence_lengths": lengths + 2,
                "logprobs": torch.zeros(ids.shape),
                "truncated": torch.arange(n) % GROUP == GROUP - 1,
            }
        )

    def update_weights_via_ipc_zmq(self) -> list[Any]:
        import ray

        self._weights = self._cluster.weights
        return [ray.put(True)]

    def prepare_refit_info(self, info: Any) -> None: ...
    def prepare_for_generation(self, *args: Any, **kwargs: Any) -> None: ...
    def finish_generation(self, *args: Any, **kwargs: Any) -> None: ...
    def clear_logger_metrics(self) -> None: ...
    def shutdown(self) -> None: ...

    def get_logger_metrics(self) -> dict[str, Any]:
        return {}


class Killed(Exception):
    pass


class Policy:
    """In place of Policy. seen: what it was trained on; it dies in the training step of number `dies_at`."""

    def __init__(self, seen: list[Any], dies_at: int | None = None, **parts: Any):
        self._cluster, self._seen, self._dies_at = parts["cluster"], seen, dies_at
        saved = parts["weights_path"]
        self._weights = 0 if saved is None else json.loads(pathlib.Path(saved).read_text())

    def train(self, data: Any, loss_fn: Any, **options: Any) -> dict[str, Any]:
        import torch

        self._weights += 1
        if self._weights == self._dies_at:
            raise Killed
        self._seen.append(data)
        metrics = {
            "global_valid_toks": [int(data["token_mask"].sum())],
            "global_valid_seqs": [len(data["token_mask"])],
            "gen_kl_error": [0.0],
            "token_mult_prob_error": [1.0],
            "lr": [0.0],
            "wd": [0.0],
        }
        return {"loss": torch.zeros(1), "grad_norm": torch.zeros(1), "all_mb_metrics": metrics}

    def get_logprobs(self, data: Any, **options: Any) -> dict[str, Any]:
        import torch

        return {"logprobs": torch.zeros(data["input_ids"].shape)}

    def get_reference_policy_logprobs(self, data: Any, **options: Any) -> dict[str, Any]:
        return {"reference_logprobs": self.get_logprobs(data)["logprobs"]}

    def stream_weights_via_ipc_zmq(self, **options: Any) -> list[Any]:
        self._cluster.weights = self._weights
        return []

    def save_checkpoint(self, weights_path: str, **options: Any) -> None:
        pathlib.Path(weights_path).parent.mkdir(parents=True)
        pathlib.Path(weights_path).write_text(json.dumps(self._weights))

    def get_free_memory_bytes(self) -> int:
        return 1

    def prepare_refit_info(self) -> None: ...
    def print_node_ip_and_gpu_id(self) -> None: ...
    def offload_before_refit(self) -> None: ...
    def offload_after_refit(self) -> None: ...
    def prepare_for_lp_inference(self, *args: Any, **kwargs: Any) -> None: ...
    def prepare_for_training(self, *args: Any, **kwargs: Any) -> None: ...
    def finalize_async_save(self) -> None: ...
    def shutdown(self) -> None: ...
