"""The curricula that are compared, as overrides of the recipe."""

from __future__ import annotations

from typing import NamedTuple

BASELINE, PUBLISHED = "uniform", "dump_ucb"  # what the others are compared with


class Arm(NamedTuple):
    name: str
    what: str  # in words
    curriculum: dict[str, str]  # keys of trainer.grpo.curriculum

    def overrides(self) -> list[str]:
        return [f"trainer.grpo.curriculum.{key}={value}" for key, value in self.curriculum.items()]


def all_arms(schedule_steps: int) -> dict[str, Arm]:
    """Every arm by name. schedule_steps: how long `easy_to_hard` takes from the first source to the last."""
    arms = (
        Arm("uniform", "sources alike", {"sources": "{name: uniform}"}),
        Arm("proportional", "pooled shuffle", {"sources": "{name: proportional}"}),
        Arm("easy_to_hard", "a fixed schedule", {"sources": f"{{name: easy_to_hard, total_steps: {schedule_steps}}}"}),
        Arm("sec", "SEC", {"sources": "{name: sec}"}),
        Arm("dump_ucb", "DUMP as published", {"sources": "{name: dump_ucb}"}),
        Arm("dump_ucb_robust", "DUMP with floors", {"sources": "{name: dump_ucb_robust}"}),
        Arm("cures", "CurES's prompts and budget, sources alike",
            {"sources": "{name: uniform}", "prompts": "{name: cures}", "budget": "{name: neyman}"}),
        Arm("dump+cures+neyman", "all three levels",
            {"sources": "{name: dump_ucb}", "prompts": "{name: cures}", "budget": "{name: neyman}"}),
        Arm("dump+filter", "DUMP, groups that teach nothing replaced",
            {"sources": "{name: dump_ucb}", "filter": "{name: zero_variance}"}),
    )  # fmt: skip
    return {arm.name: arm for arm in arms}
