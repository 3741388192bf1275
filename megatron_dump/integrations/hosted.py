"""A curriculum in somebody else's loop: rows out, rewards in, state for the host's checkpoint. Numpy only."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_dump.curriculum.blocks import NAMED, UNNAMED
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.types import Draw, Outcomes

_DEFAULTS: dict[str, Any] = {"prompts": {"name": "epoch"}, "budget": {"name": "fixed"}}
_OURS = ("source_key", "correct_reward", "resume_changed")  # of the block, besides what a Curriculum is made of


class HostedCurriculum:
    """next_draw, learn, next_draw, learn, …: a draw is made when asked for, and its feedback comes before the next.

    Where several processes ask the same, in the same order, and learn from the same global arrays, each may have its
    own: their draws are equal, for a draw is a function of seed, step and feedback.
    """

    def __init__(
        self,
        block: Mapping[str, Any],
        source_of_rows: Sequence[str],
        prompts_per_step: int,
        samples_per_prompt: int,
        seed: int,
        fingerprint: str,
        *,
        key: str = "curriculum",
        fixed_groups: bool = True,
        max_steps: int | None = None,
    ):
        """block: `sources` and, if other than the defaults, `prompts`, `budget`, `pass_rates`, `audit`, `alarm` as in
        docs/curriculum.md, and

        source_key      data_source; the host reads it: the column that names a row's source
        correct_reward  1.0; from which reward on an answer counts as right, for pass rates and the alarm
        resume_changed  refuse; `allow` continues a run whose data or settings differ, as far as its state fits

        key: where the host's configuration has the block, for error lines; fixed_groups: the host rolls every prompt
        out `samples_per_prompt` times. ValueError for unknown keys and names, and for what a host's loop cannot do.
        """
        self._key = key
        given = {**_DEFAULTS, **block}
        self._check(given, fixed_groups)
        self._correct = float(given.get("correct_reward", 1.0))
        self._may_change = given.get("resume_changed", "refuse") == "allow"
        blocks = {name: value for name, value in given.items() if name not in _OURS}
        with self._named():
            self.curriculum = Curriculum(
                source_of_rows, prompts_per_step, samples_per_prompt, seed, blocks, fingerprint, max_steps=max_steps
            )
        self.last: Draw | None = None  # handed out last
        self._again = False  # a resume found `last` without its feedback

    @property
    def step(self) -> int:
        """Steps drawn so far."""
        return self.curriculum.step

    @property
    def sources(self) -> list[str]:
        """Their names, in the order of `Draw.weights`."""
        return self.curriculum.sources

    def next_draw(self) -> Draw:
        """The next step's prompts. RuntimeError before the last draw's feedback: the host reads ahead.

        After a resume from between a draw and its feedback it is that draw again.
        """
        if self._again:
            self._again = False
            assert self.last is not None
            return self.last
        with self._named():
            self.last = self.curriculum.draw(self.curriculum.step)
        if not self.last.train:  # no option of a policy of the user's own tells before
            raise ValueError(f"{self._key}.prompts: it asks for pre-rollouts: this trainer trains on all it rolls out")
        return self.last

    def learn(
        self,
        rewards: np.ndarray,  # [N] or [P, G], by the draw's prompts, then samples; NaN: lost, or nobody could judge it
        advantages: np.ndarray | None = None,  # the same shape, as the host trains on them; None: group_advantages
        lengths: np.ndarray | None = None,  # tokens of the completions
        finished: np.ndarray | None = None,  # ended by a stop token
    ) -> None:
        """Feedback on the last draw, every rollout of it. ValueError where it does not fit the draw."""
        if self.last is None:
            raise RuntimeError(f"{self._key}: feedback, but nothing has been drawn")
        self.curriculum.observe(outcomes_of(self.last, rewards, advantages, lengths, finished, self._correct))

    def metrics(self) -> dict[str, float]:
        """`curriculum/<source>/<name>`: see docs/curriculum.md."""
        return self.curriculum.metrics()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, for the host's checkpoint."""
        return self.curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue. ValueError where the data or the settings differ, unless `resume_changed: allow`."""
        with self._named():
            for note in self.curriculum.load_state_dict(state, allow_changes=self._may_change):
                print(f"{self._key}: {note}", flush=True)
        out = self.curriculum.outstanding()
        self.last, self._again = (out[-1], True) if out else (None, False)

    def _check(self, given: Mapping[str, Any], fixed_groups: bool) -> None:
        known = (*NAMED, *UNNAMED, *_OURS)
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1) or [", ".join(known)]
                raise ValueError(f"{self._key}.{name}: no such key; did you mean {close[0]}?")
        choice = given.get("resume_changed", "refuse")
        if choice not in ("refuse", "allow"):
            raise ValueError(f"{self._key}.resume_changed: {choice!r} must be refuse or allow")
        correct = given.get("correct_reward", 1.0)
        if isinstance(correct, bool) or not isinstance(correct, (int, float)):
            raise ValueError(f"{self._key}.correct_reward: {correct!r} must be a number")
        for name, remedy in (
            ("filter", "the trainer that hosts the curriculum filters groups itself; leave it out"),
            ("budget", "this trainer rolls every prompt out equally often; set it to fixed"),
        ):
            kind = (given.get(name) or {}).get("name", "none")
            if kind != "none" and (name == "filter" or (fixed_groups and kind != "fixed")):
                raise ValueError(f"{self._key}.{name}.name: {kind!r}, but {remedy}")
        if pre := given["prompts"].get("pre_rollouts"):
            raise ValueError(f"{self._key}.prompts.pre_rollouts: {pre}: this trainer trains on all it rolls out; set 0")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the curriculum, with the names that the host's user knows."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            text = str(error).replace("trainer.grpo.curriculum", self._key)
            text = text.replace("exp_manager.explicit_log_dir", "output folder").replace("trainer.grpo.", "")
            raise (ValueError if isinstance(error, ValueError) else RuntimeError)(text) from error


def outcomes_of(
    draw: Draw,
    rewards: np.ndarray,
    advantages: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    finished: np.ndarray | None = None,
    correct_reward: float = 1.0,
) -> Outcomes:
    """Feedback on one draw as a Curriculum takes it; arguments as in HostedCurriculum.learn. ValueError for sizes."""
    groups = np.repeat(np.arange(len(draw.rollouts)), draw.rollouts)
    n = len(groups)
    columns = {"rewards": rewards, "advantages": advantages, "lengths": lengths, "finished": finished}
    flat = {name: np.asarray(column).reshape(-1) for name, column in columns.items() if column is not None}
    for name, column in flat.items():
        if len(column) != n:
            raise ValueError(f"{name} of step {draw.step}: {len(column)} values for {n} rollouts")
    values = flat["rewards"].astype(np.float64)
    finite = np.isfinite(values)
    relative = flat["advantages"].astype(np.float64) if "advantages" in flat else group_advantages(values, groups)
    starts = np.cumsum(draw.rollouts) - draw.rollouts
    return Outcomes(
        step=draw.step,
        group_ids=draw.group_ids[groups],
        samples=np.arange(n) - starts[groups],
        prompt_ids=draw.prompt_ids[groups],
        source_ids=draw.source_ids[groups],
        rewards=values,
        advantages=np.where(finite, relative, np.nan),
        correct=finite & (values >= correct_reward),
        well_formed=finite,
        lengths=flat.get("lengths", np.zeros(n)).astype(np.int64),
        finished=flat.get("finished", np.ones(n, bool)).astype(bool),
        kept=finite,
        ages=np.zeros(n, np.int64),
    )


def group_advantages(rewards: np.ndarray, groups: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """float64 [N]: (r - mean) / (std + eps) of the group's finite rewards (GRPO, 2402.03300, section 4.1.2; ddof 1).

    NaN where the reward is not finite; 0 in a group of one. groups int64 [N] in 0 .. P-1.
    """
    finite = np.isfinite(rewards)
    values = np.where(finite, rewards, 0.0)
    count = np.bincount(groups, finite)
    mean = np.bincount(groups, values) / np.maximum(count, 1)
    centred = np.where(finite, values - mean[groups], 0.0)
    std = np.sqrt(np.bincount(groups, centred**2) / np.maximum(count - 1, 1))
    return np.where(finite, centred / (std[groups] + eps), np.nan)
