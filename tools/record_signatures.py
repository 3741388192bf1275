"""Write what NeMo-RL's functions take, in a checkout of it, into the record that tests without NeMo-RL go by.

    python tools/record_signatures.py --nemo-rl ~/RL --version 0.7.0

The version's entry in tests/unit/recorded_signatures/nemo_rl.json is replaced, or a new one added; which callables are
recorded stays. Sources are read, not imported, so any Python does. The commit comes from git.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1] / "tests" / "unit" / "recorded_signatures" / "nemo_rl.json"


def parameters(checkout: Path, name: str) -> list[str] | None:
    """Parameter names of `file:function` or `file:Class.method`, without self; None where there is none."""
    file, _, path = name.partition(":")
    if not (checkout / file).is_file():
        return None
    found: ast.AST = ast.parse((checkout / file).read_text(encoding="utf-8"))
    for part in path.split("."):
        body = getattr(found, "body", [])
        matches = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part]
        if not matches:
            return None
        found = matches[-1]  # the last definition is the one that holds
    assert isinstance(found, ast.FunctionDef), name
    given = found.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [argument.arg for argument in every if argument is not None and argument.arg != "self"]


def refresh(record: dict, checkout: Path, version: str, commit: str) -> None:
    """Put the checkout's signatures into the record, under the version's name."""
    names = dict.fromkeys(name for entry in record["versions"].values() for name in entry["signatures"])
    signatures = {name: parameters(checkout, name) for name in names}
    record["versions"][version] = {"commit": commit, "signatures": signatures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nemo-rl", type=Path, required=True, help="folder of the checkout")
    parser.add_argument("--version", required=True, help="name of the entry: 0.6.0, 0.7.0, main, …")
    given = parser.parse_args()
    if not (given.nemo_rl / "nemo_rl").is_dir():
        parser.error(f"--nemo-rl {given.nemo_rl}: there is no folder nemo_rl in it; clone github.com/NVIDIA-NeMo/RL")
    git = ["git", "-C", str(given.nemo_rl), "rev-parse", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    refresh(record, given.nemo_rl, given.version, commit)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
