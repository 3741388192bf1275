"""The table of layers, held: who may import whom, and which third-party packages a module may know.

Read from the syntax tree, so nothing is imported and an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_dump"

LOW = {
    "types",
    "engine_options",
    "config",
    "curriculum",
    "rewards",
    "data",
    "advantages",
    "kl",
    "grpo",
    "distributed",
    "gather",
    "scoring",
    "shared_scoring",
    "ray_cluster",
    "batches",
    "events",
    "rollout_metrics",
    "monitor",
    "report",
    "stopwatch",
    "stopping",
    "early_stopping",
}
LAYER_3 = {"actor", "rollout", "weight_sync"}
# Unit (a module, or a folder as a whole) -> units of the package that it may import, besides itself.
UNITS: dict[str, set[str]] = {
    "types": set(),
    "protocols": {"types"},
    "engine_options": set(),
    "config": {"engine_options"},
    "curriculum": {"types"},
    "ray_cluster": {"engine_options"},
    "rewards": {"types", "ray_cluster"},
    "data": {"types"},
    "advantages": set(),
    "kl": set(),
    "grpo": {"advantages", "kl"},
    "distributed": {"types"},
    "gather": {"types", "distributed"},
    "scoring": {"types", "rewards", "distributed"},
    "rollout_metrics": {"types"},
    "shared_scoring": {"types", "rewards", "distributed", "scoring"},
    "batches": {"types", "grpo"},
    "events": {"types"},
    "stopwatch": set(),
    "early_stopping": set(),
    "stopping": {"early_stopping"},
    "console": {"types"},
    "monitor": {"types", "console"},
    "report": {"types", "config"},  # the defaults that a run changed
    "actor": {"types", "config", "distributed", "grpo"},
    "rollout": {"types", "engine_options", "distributed", "gather", "grpo", "actor", "weight_sync", "ray_cluster"},
    "weight_sync": {"types", "engine_options", "distributed", "grpo"},
    "collect": LOW | LAYER_3,
    "kl_reward": {"types", "distributed", "grpo", "batches", "collect"},
    "course": {"types", "distributed", "events", "monitor", "early_stopping", "stopping", "protocols"},
    "trainer": LOW | LAYER_3 | {"protocols", "evaluate", "collect", "kl_reward", "course"},
    "evaluate": LOW | LAYER_3,
    "engines": LOW | LAYER_3,
    "generators": LOW | LAYER_3 | {"engines", "protocols"},
    "inputs": LOW | LAYER_3 | {"evaluate"},
    "estimates": {"curriculum"},
    "evaluation": LOW | LAYER_3 | {"evaluate", "estimates", "generators", "inputs"},
    "evaluation_table": set(),
    "assemble": LOW | LAYER_3 | {"trainer", "collect", "kl_reward", "course", "inputs", "generators", "engines"},
    "integrations": {"types", "curriculum", "rewards", "distributed"},  # NeMo-Aligner's ranks share one draw
    "__init__": set(),
}
PURE = {"advantages", "kl", "grpo"}  # no collectives
# Units that may know only these third-party packages; the others are held by ONLY_IN below.
THIRD_PARTY: dict[str, set[str]] = {
    "types": {"numpy"},
    "protocols": {"numpy"},
    "engine_options": set(),  # vLLM's environment imports it
    "config": {"omegaconf", "numpy"},
    "curriculum": {"numpy"},
    "ray_cluster": {"ray"},
    "rewards": {"numpy", "math_verify", "reasoning_gym", "ray"},
    "data": {"numpy", "pyarrow"},
    "advantages": {"torch", "numpy"},
    "kl": {"torch"},
    "grpo": {"torch"},
    "kl_reward": {"torch", "numpy"},
    "distributed": {"torch", "numpy"},
    "gather": {"torch", "numpy"},
    "rollout_metrics": {"numpy"},
    "stopwatch": set(),
    "early_stopping": set(),
    "stopping": set(),
    "course": {"torch", "numpy"},
    "events": {"numpy"},
    "console": {"rich"},
    "monitor": {"wandb", "torch", "tensorboard"},
    "report": {"matplotlib", "numpy", "omegaconf", "yaml"},
    "estimates": {"numpy"},
    "evaluation": {"numpy"},
    "evaluation_table": {"rich"},
    "__init__": set(),
}
ONLY_IN: dict[str, set[str]] = {
    "megatron": {"actor"},
    "wandb": {"monitor"},
    "vllm": {"rollout", "weight_sync"},
    "ray": {"ray_cluster", "rollout", "rewards", "integrations"},
}


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that a module's source imports; `from a import b` yields a and a.b (b may be a module)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
                base = ".".join([*parents, *([base] if base else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def unit_of(name: str) -> str | None:
    """`megatron_dump.actor.model` -> `actor`; `megatron_dump` -> `__init__`; None outside the package."""
    parts = name.split(".")
    return None if parts[0] != PACKAGE else (parts[1] if len(parts) > 1 else "__init__")


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a module's imports break in the tables above, one line each."""
    unit = unit_of(module)
    if unit not in UNITS:
        return [f"{module}: {unit!r} is not in the table of layers"]
    broken = set()
    for name in imported(source, module, is_package):
        top, target = name.split(".")[0], unit_of(name)
        if top == PACKAGE:
            # `from megatron_dump import __version__` names an attribute, not a unit: allowed
            if target in UNITS and target not in UNITS[unit] | {unit, "__init__"}:
                broken.add(f"{module} imports {PACKAGE}.{target}")
        elif top == "kk":
            broken.add(f"{module} imports kk: they know each other only by the parquet schema")
        elif top not in sys.stdlib_module_names:
            if unit in THIRD_PARTY and top not in THIRD_PARTY[unit]:
                broken.add(f"{module} imports {top}")
            if unit not in ONLY_IN.get(top, {unit}):
                broken.add(f"{module} imports {top}: only {', '.join(sorted(ONLY_IN[top]))} may")
    if unit in PURE and any(n.startswith("torch.distributed") for n in imported(source, module)):
        broken.add(f"{module} imports torch.distributed")
    return sorted(broken)


def modules() -> dict[str, tuple[str, bool]]:
    """Dotted name -> (source, is a package's __init__), for every module of the package that is there."""
    found = {}
    for path in sorted((REPO / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if is_package else parts)] = (path.read_text(), is_package)
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle, or []."""
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_module_keeps_to_its_layer():
    found = modules()
    assert f"{PACKAGE}.types" in found
    assert [line for name, (source, is_package) in found.items() for line in violations(name, source, is_package)] == []


def test_no_import_cycles():
    found = modules()
    graph = {
        name: {n for n in imported(source, name, is_package) & found.keys() if n != name and not _is_parent(n, name)}
        for name, (source, is_package) in found.items()
    }
    assert cycle(graph) == []


def _is_parent(package: str, module: str) -> bool:
    """`from package import sibling` names the package too, but needs only the sibling."""
    return module.startswith(package + ".")


def test_kk_and_the_package_do_not_know_each_other():
    for path in sorted((REPO / "kk").rglob("*.py")):
        module = ".".join(path.relative_to(REPO).with_suffix("").parts)
        assert not [n for n in imported(path.read_text(), module) if n.split(".")[0] == PACKAGE], path


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("curriculum.sources", "import torch", "megatron_dump.curriculum.sources imports torch"),
        ("curriculum.sources", "def f():\n    from torch import nn", "megatron_dump.curriculum.sources imports torch"),
        ("curriculum.sources", "import megatron.core", "imports megatron: only actor may"),
        ("curriculum.sources", "from ..grpo import x", "megatron_dump.curriculum.sources imports megatron_dump.grpo"),
        ("curriculum.sources", "from megatron_dump import data", "imports megatron_dump.data"),
        ("types", "from .data import Prompt", "megatron_dump.types imports megatron_dump.data"),
        ("data", "import torch", "megatron_dump.data imports torch"),
        ("rewards.kk", "import kk.verify", "imports kk"),
        ("trainer", "from megatron.core import mpu", "imports megatron: only actor may"),
        ("trainer", "import wandb", "imports wandb: only monitor may"),
        ("grpo", "import torch.distributed as dist", "megatron_dump.grpo imports torch.distributed"),
        ("kl", "from torch import distributed", "megatron_dump.kl imports torch.distributed"),
        ("actor.actor", "from megatron_dump.curriculum import Curriculum", "imports megatron_dump.curriculum"),
        ("surprise", "", "'surprise' is not in the table of layers"),
    ],
)
def test_the_checker_sees(module, source, message):
    assert any(message in line for line in violations(f"{PACKAGE}.{module}", source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("curriculum.sources", "import json\nimport numpy as np\nfrom . import streams\nfrom ..types import Draw"),
        ("actor.model", "import torch\nfrom megatron.core import mpu\nfrom megatron_dump.actor import platform"),
        ("monitor", "def f():\n    import wandb\nfrom megatron_dump import __version__"),
    ],
)
def test_the_checker_allows(module, source):
    assert violations(f"{PACKAGE}.{module}", source) == []


def test_the_checker_sees_relative_imports_and_cycles():
    assert imported("from . import b\nfrom ..c import d", "p.a.x") == {"p.a", "p.a.b", "p.c", "p.c.d"}
    assert imported("from . import b\nfrom ..c import d", "p.a", is_package=True) == {"p.a", "p.a.b", "p.c", "p.c.d"}
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
