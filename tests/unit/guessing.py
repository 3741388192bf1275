"""A whole loop around a policy that only guesses, for tests."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dump.collect import Collector
from megatron_dump.config import GRPOConfig
from megatron_dump.course import Course
from megatron_dump.curriculum import Curriculum, MegatronCurriculumBatchSampler, streams
from megatron_dump.curriculum.codec import outcomes_from_json
from megatron_dump.data import PromptDataset
from megatron_dump.distributed import Replica
from megatron_dump.monitor import Monitor
from megatron_dump.rollout import Request
from megatron_dump.rollout.eager import NoEngines, Ready
from megatron_dump.scoring import Scorer
from megatron_dump.trainer import GRPOTrainer
from megatron_dump.types import Completion, Outcomes, Score
from tests.unit.curricula import config
from tests.unit.test_data import encode, row, write


def verdict(text: str, ground_truth: str) -> Score:
    return Score(float(text == "right"), text == "right", True)


def crashing(text: str, ground_truth: str) -> Score:
    if text == "right":
        raise ValueError("this verifier has a bug")
    return verdict(text, ground_truth)


class Guesser:
    """A policy that is trained and sampled from: right with a chance per source, which rises with every update."""

    def __init__(self, chances: dict[str, float]):
        self.chances, self.version = chances, 0

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(step, request, sample) for request in requests for sample in request.samples]

    def _complete(self, step: int, request: Request, sample: int) -> Completion:
        chance = self.chances[request.prompt.source]
        chance = 1 - (1 - chance) * 0.9**self.version if chance else 0.0
        right = streams.uniforms(sample + 1, "guess", step, request.group_id)[-1] < chance
        tokens = np.zeros(2 if right else 5, np.int64)
        text = "right" if right else "wrong"
        return Completion(request.group_id, sample, tokens, tokens.astype(np.float32), True, self.version, text)

    def submit(self, step: int, requests: Sequence[Request]) -> Ready:
        return Ready(self.generate(step, requests))

    def make_batch(self, prompts, completions, advantages, *others: Any) -> Any:
        return advantages

    def compute_logprobs(self, batch: Any, reference: bool = False) -> None:
        return None

    def train_step(self, batch: Any) -> dict[str, float]:
        self.version += 1
        return {}

    def generating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def memory_usage(self) -> dict[str, float]:
        return {}

    def memory_report(self) -> str:
        return "memory: none"


class Store:
    """Checkpoints in memory, as JSON."""

    def __init__(self):
        self.saved: dict[int, str] = {}
        self.actor: Guesser | None = None  # that `load` restores
        self.longest_save_s = 0.0

    def latest(self) -> int | None:
        return max(self.saved, default=None)

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.saved[step] = json.dumps({**state, "version": self.actor.version})

    def poll(self) -> bool:
        return True

    def wait(self) -> None: ...

    def state(self, step: int) -> dict[str, Any]:
        return json.loads(self.saved[step])

    def load(self, step: int) -> dict[str, Any]:
        self.actor.version = self.state(step)["version"]
        return {}


def trainer(
    folder: Path,
    steps: int = 4,
    *,
    store: Store | None = None,
    chances: dict[str, float] | None = None,
    encode: Callable[[list[dict[str, str]]], list[int]] = encode,
    judge: Callable[[str, str], Score] = verdict,
    settings: dict[str, Any] | None = None,
    size: int = 12,
    **curriculum: Any,
) -> GRPOTrainer:
    """A run of 8 prompts x 4 rollouts a step over `size` rows of each source, resumed if the store holds a checkpoint.

    chances: the policy's, by source; settings: of GRPOConfig; the rest is tests.unit.curricula.config's.
    """
    chances = chances or {"easy": 0.7, "hard": 0.1, "medium": 0.4}
    folder.mkdir(exist_ok=True)
    rows = [row(f"{source} {i}", source=source) for i in range(size) for source in chances]
    data = PromptDataset(write(folder / "train.parquet", *rows), encode=encode)
    held_out = PromptDataset(write(folder / "val.parquet", *rows[:6]), encode=encode)
    counts = {"num_prompts_per_grpo_step": 8, "samples_per_prompt": 4, "run_validation_step_0": False}
    grpo_config = GRPOConfig(**{**counts, "max_steps": steps, **(settings or {})})
    chosen = Curriculum(
        data.source_of_rows,
        8,
        4,
        7,
        config(**curriculum),
        data.fingerprint,
        max_steps=steps,
        max_staleness=grpo_config.max_staleness,
    )
    sampler = MegatronCurriculumBatchSampler(len(data), 0, 1, 8, 0, 1, curriculum=chosen)
    actor, store = Guesser(chances), store or Store()
    store.actor = actor
    replica = Replica(0, 1, None, torch.device("cpu"))
    age = lambda completion: actor.version - completion.policy_version  # noqa: E731
    scorer = Scorer({"*": f"{judge.__module__}:{judge.__name__}"}, data.sources)
    collector = Collector(actor, scorer, data, sampler, chosen.filter, replica, 1, True, age)
    monitor = Monitor(folder, data.sources, steps, 0, {})
    made = GRPOTrainer(
        config=grpo_config,
        settings={},
        updates=1,
        max_length=5,
        loss_agg_mode="token-mean",
        use_reference=False,
        reward_kl=None,
        owns_curriculum=True,
        actor=actor,
        engines=NoEngines(),
        collector=collector,
        validator=actor,
        dataset=data,
        validation=held_out,
        curriculum=chosen,
        replica=replica,
        monitor=monitor,
        course=Course(store, monitor, replica.device, steps, grpo_config.save_interval),
    )
    made.resume()
    return made


def read(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def logged(folder: Path, name: str) -> np.ndarray:
    """float64 [steps, K]: `curriculum/<source>/<name>` of every step, out of metrics.jsonl."""
    steps = [r for r in read(folder) if "train/accuracy" in r]
    sources = sorted({key.split("/")[1] for key in steps[0] if key.startswith("curriculum/")})
    return np.array([[step[f"curriculum/{source}/{name}"] for source in sources] for step in steps])


def observed(folder: Path) -> list[Outcomes]:
    """What the curriculum was told, call by call, out of curriculum.jsonl."""
    return [outcomes_from_json(e["outcomes"]) for e in read(folder, "curriculum.jsonl") if e["event"] == "observe"]
