"""May this run continue that one? And if the user says so although they differ: what can be kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dump.curriculum import state as states
from megatron_dump.curriculum.registry import ROOT

Difference = tuple[str, Any, Any]  # key, value in the checkpoint, value here


def differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    """What identifies a curriculum and is not the same, the blocks of its configuration one by one."""
    flat_saved, flat_here = _flat(saved), _flat(here)
    return [(k, flat_saved.get(k), flat_here[k]) for k in flat_here if flat_saved.get(k) != flat_here[k]]


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    names = {"source names" if k == "sources" else k: v for k, v in identity.items() if k != "config"}
    blocks = {k: v for k, v in identity.get("config", {}).items() if k != "alarm"}  # no draw depends on it
    return names | blocks


def refusal(difference: Difference) -> str:
    """One line: both values, and what can be done."""
    key, saved, here = difference
    if key == "version":
        return f"the checkpoint's curriculum has version {saved!r}, this program's {here!r}: they cannot be mixed"
    return (
        f"curriculum {key} differs: the checkpoint has {saved!r}, this run {here!r}; set it back, choose another "
        f"exp_manager.explicit_log_dir, or set {ROOT}.resume_changed=allow"
    )


def carry_over(
    saved: Mapping[str, Any], here: Mapping[str, Any], parts: Mapping[str, Any], changes: list[Difference]
) -> list[str]:
    """Load into `parts` what still fits of a saved state, sources matched by name; what changed or starts afresh."""
    notes = [f"curriculum {key} was {old!r}, is {new!r}" for key, old, new in changes]
    for name, part in parts.items():
        arrays = states.unpack(saved["parts"].get(name, {}))
        if name in ("prompt_policy", "pass_rates"):  # per row of the data set
            fits = bool(arrays) and _same(saved, here, "fingerprint", "sources")
            if name == "prompt_policy":
                fits = fits and _same(saved, here, "seed") and saved["config"]["prompts"] == here["config"]["prompts"]
            if fits:
                part.load_state_dict(arrays)
            elif part.state_dict():
                notes.append(f"curriculum {name} starts afresh")
            continue
        if name == "source_policy" and saved["config"]["sources"]["name"] != here["config"]["sources"]["name"]:
            arrays = {}
        carried, lost = states.by_name(arrays, part.state_dict(), saved["sources"], here["sources"])
        part.load_state_dict(carried)
        notes += [f"curriculum {name}: {array} starts afresh" for array in lost]
    if saved["open"]:
        steps = ", ".join(str(entry["step"]) for entry in saved["open"])
        notes.append(f"curriculum: the draws of step {steps}, which were out, are forgotten")
    return notes


def _same(saved: Mapping[str, Any], here: Mapping[str, Any], *keys: str) -> bool:
    return all(saved[key] == here[key] for key in keys)
