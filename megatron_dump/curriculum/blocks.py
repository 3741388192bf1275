"""The blocks of `trainer.grpo.curriculum`: what each may be, and all its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_dump.curriculum.budget import BUDGETS
from megatron_dump.curriculum.filters import FILTERS
from megatron_dump.curriculum.guards import Alarm, Audit
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.prompts import PROMPTS
from megatron_dump.curriculum.registry import ROOT, Named, options
from megatron_dump.curriculum.sources import SOURCES

NAMED: dict[str, Named] = {kind.section: kind for kind in (SOURCES, PROMPTS, BUDGETS, FILTERS)}
UNNAMED: dict[str, type] = {"pass_rates": PromptPassRates, "audit": Audit, "alarm": Alarm}


def describe_blocks(config: Mapping[str, Any], max_steps: int | None = None) -> dict[str, Any]:
    """The blocks with every option filled in; ValueError for an unknown name or option, or a missing block.

    `sources`, `prompts` and `budget` must be there; the others have defaults. Schedules without a `total_steps` of
    their own take the run's `max_steps`: written down here, it cannot change unnoticed over a resume.
    """
    blocks = {}
    for section, kind in NAMED.items():
        block = config.get(section, {"name": "none"} if section == "filter" else None)
        if not isinstance(block, Mapping) or "name" not in block:
            raise ValueError(f"{ROOT}.{section}: {block!r} must be a block with a name, as in {{name: ...}}")
        blocks[section] = described = kind.describe(block)
        if described.get("total_steps", 0) is None:
            described["total_steps"] = max_steps
    blocks |= {name: options(name, kind, config.get(name) or {}) for name, kind in UNNAMED.items()}
    return json.loads(json.dumps(blocks))  # as a checkpoint will have it: there a key such as 3 is "3"
