"""The curricula that are compared, as overrides of the recipe."""

from __future__ import annotations

from typing import NamedTuple

BASELINE, PUBLISHED = "uniform", "dump_ucb"  # what the others are compared with


LEVELS = {"prompts": "{name: epoch}", "budget": "{name: fixed}", "filter": "{name: none}"}  # where an arm names none
CURES = {"prompts": "{name: cures}", "budget": "{name: neyman}"}
ROBUST = "{name: dump_ucb_robust, cost_exponent: 0, temperature: 0.05}"
PER_TOKEN = "{name: dump_ucb_robust, cost_exponent: 1, temperature: 0.15}"


class Arm(NamedTuple):
    name: str
    what: str  # in words
    curriculum: dict[str, str]  # keys of trainer.grpo.curriculum; no level is left to the defaults

    def overrides(self) -> list[str]:
        return [f"trainer.grpo.curriculum.{key}={value}" for key, value in self.curriculum.items()]


def all_arms(schedule_steps: int) -> dict[str, Arm]:
    """Every arm by name. schedule_steps: how long `easy_to_hard` takes from the first source to the last."""
    schedule = f"{{name: easy_to_hard, total_steps: {schedule_steps}}}"
    arms = (
        ("uniform", "sources alike", "{name: uniform}", {}),
        ("proportional", "pooled shuffle", "{name: proportional}", {}),
        ("easy_to_hard", "a fixed schedule", schedule, {}),
        ("sec", "SEC", "{name: sec}", {}),
        ("dump_ucb", "DUMP as published", "{name: dump_ucb}", {}),
        ("dump_ucb_robust", "DUMP per prompt, with a floor", ROBUST, {}),
        ("robust_per_token_soft", "the same per token, at temperature 0.15, not 0.05", PER_TOKEN, {}),
        ("cures", "CurES's prompts and budget, sources alike", "{name: uniform}", CURES),
        ("dump+cures+neyman", "DUMP as published, CurES's prompts and budget", "{name: dump_ucb}", CURES),
        (
            "dump+filter",
            "DUMP, groups that teach nothing replaced",
            "{name: dump_ucb}",
            {"filter": "{name: zero_variance}"},
        ),
    )
    return {name: Arm(name, what, {"sources": sources, **LEVELS, **rest}) for name, what, sources, rest in arms}
