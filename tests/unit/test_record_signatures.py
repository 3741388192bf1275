"""tools/record_signatures.py on a checkout of two files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import record_signatures

SOURCE = """
class Loader:
    def __init__(self, a, /, b=1, *rest, c, **more): ...

def draw(batch): ...
def draw(batch, seed): ...
"""


def test_a_version_is_replaced_and_the_others_stay(tmp_path, monkeypatch):
    old = {"commit": "1", "signatures": {"nemo_rl/a.py:Loader.__init__": ["a"], "nemo_rl/a.py:draw": ["batch"]}}
    new = {"commit": "2", "signatures": {"nemo_rl/a.py:gone": [], "nemo_rl/b.py:none": None}}
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"project": "p", "versions": {"0.6.0": old, "main": new}}))
    checkout = tmp_path / "RL"
    (checkout / "nemo_rl").mkdir(parents=True)
    (checkout / "nemo_rl" / "a.py").write_text(SOURCE)
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(record_signatures, "RECORD", record)
    monkeypatch.setattr(sys, "argv", ["record_signatures.py", "--nemo-rl", str(checkout), "--version", "main"])
    record_signatures.main()
    found = json.loads(record.read_text())["versions"]
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert found == {
        "0.6.0": old,
        "main": {
            "commit": head,
            "signatures": {
                "nemo_rl/a.py:Loader.__init__": ["a", "b", "rest", "c", "more"],
                "nemo_rl/a.py:draw": ["batch", "seed"],  # the last definition holds
                "nemo_rl/a.py:gone": None,
                "nemo_rl/b.py:none": None,
            },
        },
    }
