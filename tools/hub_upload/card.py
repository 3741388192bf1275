"""The model card: where the weights come from, what the run's configuration was, and what was measured."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from megatron_dump.config import Config

_SHOWN = ("accuracy", "pass@", "maj@", "reward", "length")
_LEFT_OUT = ("exp_manager.", "trainer.grpo.inference_backend.ray.", "trainer.grpo.inference_backend.vllm.python")


def model_card(
    model: pathlib.Path,
    repo_id: str,
    licence: str,
    base_model: str | None,
    run: pathlib.Path | None,
    checkpoint: pathlib.Path | None,
    evaluations: Sequence[pathlib.Path],
) -> str:
    """README.md with the Hub's metadata. run, checkpoint: None where the folder came from no run that is at hand.

    FileNotFoundError or ValueError for an evaluation that cannot be read.
    """
    state = _read_json(checkpoint / "state.json") if checkpoint and (checkpoint / "state.json").is_file() else {}
    config_file = run / "config.yaml" if run else None
    if run is not None and not run.is_dir():
        raise FileNotFoundError(f"--run {run}: no such folder")
    metadata = {
        "license": licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "curriculum", "megatron-dump"],
    }
    if base_model:
        metadata["base_model"] = base_model
    architecture = _read_json(model / "config.json").get("architectures") or ["unknown"]
    lines = [f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---", f"# {repo_id.rsplit('/', 1)[-1]}"]
    lines.append(f"A {architecture[0]} trained by GRPO with an adaptive curriculum (megatron_dump).")
    if "step" in state:
        lines.append(f"Weights of training step {state['step']}.")
    fingerprint = _fingerprint(run, state)
    if fingerprint:
        lines.append(f"## Data\nSHA-256 over prompts, ground truths and sources in order: `{fingerprint}`")
    if config_file is not None and config_file.is_file():
        lines.append(f"## Configuration\nWhat differs from the defaults:\n```yaml\n{_difference(config_file)}```")
    lines += [_evaluation(path, checkpoint) for path in evaluations]
    if not evaluations and state.get("validation"):
        lines.append(_validation(state["validation"]))
    return "\n\n".join(lines) + "\n"


def _difference(config_file: pathlib.Path) -> str:
    """Keys that are not the defaults'. Folders' names are a machine's own and stay there.

    What config.yaml refers to instead of holding it is a secret, and stays a reference.
    """
    defaults = _flat(OmegaConf.to_container(OmegaConf.structured(Config)))
    given = _flat(OmegaConf.to_container(OmegaConf.load(config_file), resolve=False))
    different = {
        key: _nameless(value)
        for key, value in given.items()
        if defaults.get(key, "???") != value and not key.startswith(_LEFT_OUT)
    }
    return yaml.safe_dump(different, allow_unicode=True, width=110) if different else "# nothing\n"


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or not node:
        return {prefix.rstrip("."): node}
    return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}


def _nameless(value: Any) -> Any:
    """Paths by their last part."""
    if isinstance(value, list):
        return [_nameless(item) for item in value]
    is_path = isinstance(value, str) and (value.startswith(("/", "~", ".", "\\")) or value.count("/") > 1)
    return pathlib.PurePath(value).name if is_path else value


def _fingerprint(run: pathlib.Path | None, state: Mapping[str, Any]) -> str | None:
    """The training data's: of the checkpoint, or of the head of the run's decision log."""
    if found := (state.get("curriculum") or {}).get("fingerprint"):
        return str(found)
    log = run / "curriculum.jsonl" if run else None
    if log is None or not log.is_file():
        return None
    with log.open() as lines:
        return json.loads(next(lines, "{}")).get("fingerprint")


def _evaluation(path: pathlib.Path, checkpoint: pathlib.Path | None) -> str:
    """The tables of an evaluation.json. ValueError for one of another checkpoint."""
    result = _read_json(path)
    try:
        name = pathlib.PurePath(result["checkpoint"] or result["model"]).name
        if checkpoint is not None and name != checkpoint.name:
            raise ValueError(f"--evaluation {path}: it is of {name}, not of {checkpoint.name}")
        confidence = f"{result['settings']['confidence']:.0%}"
        parts = [f"## Evaluation\nOf `{name}`, with {confidence} intervals by a bootstrap over prompts."]
        for name, file in result["files"].items():
            for mode, table in file["modes"].items():
                sampling = result["settings"]["sampling"]
                at = f", temperature {sampling['temperature']:g}" if mode == "sampled" else ""
                parts.append(f"**{pathlib.PurePath(name).name}** ({file['prompts']} prompts, {mode}{at})\n")
                rows = [*table["sources"].items(), ("mean", table["mean"])]
                metrics = list(dict.fromkeys(m for _, row in rows for m in row if m.startswith(_SHOWN)))
                cells = [[source, *(_cell(row.get(metric)) for metric in metrics)] for source, row in rows]
                parts.append(_markdown(["source", *metrics], cells))
        return "\n".join(parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--evaluation {path}: not what examples/evaluate.py writes ({error!r})") from None


def _validation(metrics: Mapping[str, float]) -> str:
    rows = [[key.removeprefix("val/"), f"{value:.3f}"] for key, value in metrics.items()]
    return "## Validation\nBy the run itself, at this step.\n\n" + _markdown(["metric", "value"], rows)


def _cell(found: Mapping[str, float | None] | None) -> str:
    if not found or found["value"] is None:
        return "–"
    low, high = ("–" if found[end] is None else f"{found[end]:.3f}" for end in ("low", "high"))
    return f"{found['value']:.3f} ({low}…{high})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["--"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    return found
