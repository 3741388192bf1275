"""Write what TRL or verl compute on random batches: tests/unit/reference_vectors/{trl,verl}.json.

    python tools/make_reference_vectors.py trl     # in an environment with TRL
    python tools/make_reference_vectors.py verl    # in one with verl

Their own functions run, on CPU; nothing of this project is imported. Environments that import them without a GPU:

    pip install torch==2.13.0 && pip install trl==1.16.0
    pip install torch==2.13.0 && pip install --no-deps verl==0.9.1 && pip install "tensordict<=0.10" \\
        "transformers<5.11" ray hydra-core codetiming datasets peft orjson cachetools uvicorn fastapi torchdata

tests/unit/test_reference_vectors.py compares this project with the files.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import pathlib
import platform

from reference_vectors.batches import SEED, losses_batches
from rich.console import Console
from rich.progress import track

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "tests/unit/reference_vectors"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("package", choices=("trl", "verl"))
    parser.add_argument("--out", type=pathlib.Path, default=VECTORS, help="folder")
    options = parser.parse_args()
    cases = importlib.import_module(f"reference_vectors.{options.package}_cases")
    head = {
        "package": options.package,
        "version": importlib.metadata.version(options.package),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "seed": SEED,
        "made_by": f"python tools/make_reference_vectors.py {options.package}",
    }
    parts = (lambda: {"batches": losses_batches()}, lambda: {"advantages": cases.advantages()}, cases.losses)
    body: dict = {}
    for part in track(parts, options.package, console=Console(stderr=True), transient=True):
        body |= part()
    path = options.out / f"{options.package}.json"
    path.write_text(as_json({**head, **body}))
    print(f"{path}: {path.stat().st_size} bytes, {sum(len(v) for v in body.values())} entries")


def as_json(vectors: dict) -> str:
    """One line an entry, so that a difference between two versions can be read."""
    lines = []
    for key, value in vectors.items():
        if isinstance(value, list):
            entries = ",\n".join("  " + json.dumps(entry) for entry in value)
            lines.append(f" {json.dumps(key)}: [\n{entries}\n ]")
        elif isinstance(value, dict):
            entries = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{entries}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
