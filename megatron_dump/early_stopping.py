"""Stopping when a metric no longer improves, by the rule and the names of Lightning's and NeMo's EarlyStopping."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class EarlyStopping:
    """Counts the checks since `monitor` last improved by more than `min_delta`.

    A metric of the validation ("val/…") is checked at every validation, any other at every step. A value that is not
    finite is no improvement.
    """

    monitor: str
    mode: str = "max"  # or min
    min_delta: float = 0.001
    patience: int = 10  # checks without an improvement, after which the run ends
    verbose: bool = True  # tell of each improvement
    strict: bool = True  # a check without the metric is an error; False: it does not count
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    @property
    def is_over(self) -> bool:
        return self.waited >= self.patience

    @property
    def why(self) -> str:
        """In words for people."""
        found = "it was never finite" if self.best is None else f"best {self.best:.6g} at step {self.best_step}"
        return (
            f"{self.monitor} has not improved by more than {self.min_delta:g} in {self.waited} checks "
            f"(exp_manager.early_stopping_callback_params): {found}"
        )

    def observe(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Check; what to tell people, if anything. ValueError when the metric is missing and `strict`."""
        if self.monitor not in metrics:
            if self.strict:
                raise missing("exp_manager.early_stopping_callback_params", self.monitor, metrics)
            return None
        value, sign = metrics[self.monitor], -1.0 if self.mode == "min" else 1.0
        if not math.isfinite(value) or (self.best is not None and sign * (value - self.best) <= self.min_delta):
            self.waited += 1
            return None
        before = "" if self.best is None else f" from {self.best:.6g}"
        self.best, self.best_step, self.waited = value, step, 0
        return f"{self.monitor} improved{before} to {value:.6g}" if self.verbose else None

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("monitor", "mode", "best", "best_step", "waited")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting; from the beginning, where another metric was watched."""
        if (state["monitor"], state["mode"]) == (self.monitor, self.mode):
            self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]


def missing(block: str, monitor: str, metrics: Mapping[str, float]) -> ValueError:
    """One line that names the nearest metric there is."""
    near = difflib.get_close_matches(monitor, metrics, n=3, cutoff=0.4)
    hint = f"; near it are {', '.join(near)}" if near else ""
    return ValueError(f"{block}.monitor={monitor}: it was not measured{hint} (metrics.jsonl has every name)")
