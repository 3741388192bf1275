"""The curriculum: sources x prompts x budget behind draw, refill, observe, state_dict and metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_dump.curriculum import metrics as step_metrics
from megatron_dump.curriculum import resume
from megatron_dump.curriculum.blocks import describe_blocks
from megatron_dump.curriculum.decision_log import draw_event, observe_event
from megatron_dump.curriculum.ledger import Ledger
from megatron_dump.curriculum.parts import make_parts
from megatron_dump.curriculum.promises import check_slots, check_weights
from megatron_dump.curriculum.rows import SourceRows, ranks_within
from megatron_dump.types import Draw, Outcomes

STATE_VERSION = 2


class Curriculum:
    """Draws each step's prompts and learns from their outcomes: draw(0), observe, draw(1), observe, ...

    One process owns it (rank 0) and the draws are broadcast. A draw is a function of (seed, step, outcomes observed):
    there is no generator state, and nothing depends on how many ranks train. Only `observe` teaches it, and only with
    the outcomes of draws that are out: validation has no way in.

    Asynchronous generation: up to `max_staleness` steps may be drawn ahead of the oldest whose outcomes are missing,
    and outcomes come in any order, group by group. What is out is part of the state.
    """

    def __init__(
        self,
        source_names_of_rows: Sequence[str],
        prompts_per_step: int,
        samples_per_prompt: int,
        seed: int,
        config: Mapping[str, Any],
        fingerprint: str,
        *,
        max_steps: int | None = None,
        max_staleness: int = 0,
    ):
        """source_names_of_rows: the source of every row of the data set; fingerprint: identifies its contents;
        config: `trainer.grpo.curriculum`, with the blocks sources, prompts and budget, each with a `name`, and
        optionally filter, pass_rates, audit and alarm; max_steps: how long schedules over a whole run are.

        Raises ValueError for an empty data set, counts below 1, and unknown names or options.
        """
        _require("num_prompts_per_grpo_step", prompts_per_step, 1)
        _require("samples_per_prompt", samples_per_prompt, 1)
        _require("max_staleness", max_staleness, 0)
        if len(source_names_of_rows) == 0:
            raise ValueError("the data set has no rows: there is nothing to draw from")
        self._rows = SourceRows(source_names_of_rows)
        self.sources: list[str] = self._rows.names
        self.prompts_per_step, self.samples_per_prompt, self.seed = prompts_per_step, samples_per_prompt, seed
        self.n_rows, self.max_steps, self.max_staleness = len(source_names_of_rows), max_steps, max_staleness
        self._config = describe_blocks(config, max_steps)
        self._parts = make_parts(self._config, self._rows, prompts_per_step, samples_per_prompt, seed, max_steps)
        self.filter = self._parts.filter
        self._fingerprint = fingerprint
        self.step = 0  # the next step whose training round is to be drawn
        self._open: dict[int, Ledger] = {}  # steps whose outcomes have not all come
        self._last: Ledger | None = None  # the step completed last
        self.on_event: Callable[[dict[str, Any]], None] | None = None  # told of every draw and outcome, for the log

    @property
    def weights(self) -> np.ndarray:
        """float64 [K]: the source distribution the next draw will use, given what has been observed so far."""
        weights = self._parts.source_policy.weights(self.step)
        check_weights(self._parts.source_policy, weights, len(self.sources))
        return weights

    def draw(self, step: int) -> Draw:
        """The next round of `step`: its pre-rollouts, if the prompt policy wants any, then what it trains on.

        A round of pre-rollouts has `train=False`, and must be observed before the next round is drawn. RuntimeError
        out of order, or when more than `max_staleness` steps would be waiting for their outcomes.
        """
        if step != self.step:
            raise RuntimeError(f"draw({step}) out of order: the next step of this curriculum is {self.step}")
        ledger = self._open.get(step, Ledger(step))
        waiting = [s for s in self._open if s != step]
        if len(waiting) > self.max_staleness or not ledger.observed.all():
            waiting = waiting if len(waiting) > self.max_staleness else [step]
            raise RuntimeError(
                f"draw({step}) before the outcomes of step {min(waiting)} were observed: its weights would be stale"
            )
        self._open[step] = ledger
        pre = self._parts.prompt_policy.pre_rollouts(step)
        if pre is not None and ledger.n_groups < len(pre[0]):
            return self._draw_pre_rollouts(ledger, *pre)
        if pre is not None:
            self._parts.prompt_policy.prepared(step)
        weights = self.weights
        slots = self._parts.source_policy.slots(step, step * self.prompts_per_step, self.prompts_per_step, self.seed)
        check_slots(self._parts.source_policy, slots, self.prompts_per_step, len(self.sources))
        slots = self._parts.audit.apply(step, slots, self.seed)
        total = self.prompts_per_step * self.samples_per_prompt
        self.step = step + 1
        return self._draw(ledger, slots, total, weights, None)

    def refill(self, step: int, rejected: np.ndarray) -> Draw | None:
        """Fresh prompts for the groups `rejected` (ids) of a step that is out: same sources, same rollouts in all.

        None when the filter's `max_refills` rounds are spent or the sources have no other prompts.
        """
        ledger = self._open.get(step)
        if ledger is None or not ledger.training:
            raise RuntimeError(f"refill of step {step}, but no training round of it is out")
        if ledger.refills >= self.filter.max_refills or not len(rejected):
            return None
        slots = ledger.source_ids[rejected]
        used = np.bincount(self._rows.of_row[np.unique(ledger.trained_on)], minlength=len(self.sources))
        fresh = ranks_within(slots) < (self._parts.prompt_policy.available(step) - used)[slots]
        if not fresh.any():
            return None
        ledger.refills += 1
        total = int(ledger.rollouts[rejected[fresh]].sum())
        return self._draw(ledger, slots[fresh], total, ledger.training[0].weights, rejected)

    def observe(self, outcomes: Outcomes) -> None:
        """Learn from whole groups of draws that are out: every rollout, those of rejected groups too.

        Raises RuntimeError for another step's outcomes (or none being out), ValueError if they do not fit the draw.
        """
        ledger = self._open.get(outcomes.step)
        if ledger is None:
            out = sorted(self._open)
            expected = f"the draw that is out is of step {', '.join(map(str, out))}" if out else "no draw is out"
            raise RuntimeError(f"observe got outcomes of step {outcomes.step}, but {expected}")
        ledger.check_and_mark(outcomes)
        self._parts.observe(outcomes)
        if self.on_event:
            self.on_event(observe_event(outcomes))
        if ledger.is_complete:
            self._last = self._open.pop(outcomes.step)

    def _draw_pre_rollouts(self, ledger: Ledger, rows: np.ndarray, n: int) -> Draw:
        first = ledger.n_groups
        chunk = rows[first : first + self.prompts_per_step]
        sources = self._rows.of_row[chunk].astype(np.int64)
        rollouts = np.full(len(chunk), n, np.int64)
        return self._hand_out(ledger, Draw(ledger.step, chunk, sources, rollouts, self.weights, first, False), None)

    def _draw(
        self, ledger: Ledger, slots: np.ndarray, total: int, weights: np.ndarray, rejected: np.ndarray | None
    ) -> Draw:
        first = ledger.n_groups
        prompt_ids, rollouts = self._parts.choose(ledger.step, first, slots, ledger.trained_on, total)
        draw = Draw(ledger.step, prompt_ids, slots, rollouts, weights, first)
        return self._hand_out(ledger, draw, rejected)

    def _hand_out(self, ledger: Ledger, draw: Draw, rejected: np.ndarray | None) -> Draw:
        if self.on_event:
            at = min(self._open, default=draw.step)
            self.on_event(draw_event(draw, rejected, self._parts.source_policy.metrics(), at))
        ledger.add(draw)
        self._parts.source_policy.drawn(draw.source_ids, draw.rollouts)
        return draw

    def outstanding(self) -> list[Draw]:
        """Rounds some of whose groups have not been observed, oldest first: what a resumed run must generate again."""
        return [
            draw
            for _, ledger in sorted(self._open.items())
            for draw in ledger.draws
            if not ledger.observed[draw.group_ids].all()
        ]

    def alarms(self) -> dict[str, str]:
        """Source -> what is wrong: no right answer, and answers that cannot be read (guards.Alarm)."""
        return {
            self.sources[k]: self._parts.alarm.message(k) for k in np.flatnonzero(self._parts.alarm.raised()).tolist()
        }

    def metrics(self) -> dict[str, float]:
        """`curriculum/<source>/<name>`, for the log of the step completed last.

        weight                        of that step: the one its draw was made WITH
        n_prompts, quota              of that step: prompts drawn and rollouts allotted, refills included
        n_refilled, n_pre_rollouts    of that step: prompts that replaced rejected ones; rollouts not trained on
        n_rollouts, n_kept, n_dropped of that step: rollouts observed, trained on, and without a finite reward
        frac_zero_std                 of that step: share of groups whose rewards are all alike
        format_failure                of that step: share of rollouts that could not be read
        alarm                         1 where guards.Alarm is raised
        pass_rate                                     posterior mean after it
        ucb, bonus, learnability, ...                 after it, of policies that have them: what makes the next weights
        mean_abs_adv                                  over the policy's window where it has one, else over that step
        """
        arrays = {} if self._last is None else step_metrics.step_arrays(self._last, len(self.sources))
        learned = self._parts.metrics()
        if "mean_abs_adv" in learned:
            arrays.pop("mean_abs_adv", None)
        return step_metrics.flatten({**learned, **arrays}, self.sources)

    def header(self) -> dict[str, Any]:
        """All that a replay needs besides the draws and outcomes; JSON-able."""
        runs = self._rows.runs().tolist()
        return {**self._identity(), "rows": runs, "max_steps": self.max_steps, "max_staleness": self.max_staleness}

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "sources": self.sources,
            "fingerprint": self._fingerprint,
            "seed": self.seed,
            "prompts_per_step": self.prompts_per_step,
            "samples_per_prompt": self.samples_per_prompt,
            "config": self._config,
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; every float survives JSON exactly."""
        out = [ledger.state_dict() for _, ledger in sorted(self._open.items())]
        return {**self._identity(), "step": self.step, "parts": self._parts.state_dict(), "open": out}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Continue a run. ValueError if it would differ from the saved one: other sources, data, seed or policies.

        With `allow_changes` what still fits is kept, sources matched by name; returns what was reset, a line each.
        """
        here = self._identity()
        differences = resume.differences(state, here)
        if differences and not (allow_changes and state.get("version") == STATE_VERSION):
            raise ValueError(resume.refusal(differences[0]))
        if differences:
            notes = resume.carry_over(state, here, self._parts.stateful(), differences)
            self._open = {}  # what was out was drawn for the run as it was: those steps are drawn anew
            self.step = min((int(entry["step"]) for entry in state["open"]), default=int(state["step"]))
        else:
            notes = []
            self._parts.load_state_dict(state["parts"])
            self._open = {int(entry["step"]): Ledger.from_state(entry) for entry in state["open"]}
            self.step = int(state["step"])
        self._last = None
        return notes

    def digest(self) -> str:
        """SHA-256 (hex) of the state: equal digests mean equal draws from here on."""
        return hashlib.sha256(json.dumps(self.state_dict(), sort_keys=True).encode()).hexdigest()


def _require(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"trainer.grpo.{key}: {value!r} must be at least {least}")
