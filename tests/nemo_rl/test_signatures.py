"""NeMo-RL's signatures in this checkout: those the adapter asks for, and those that tests without NeMo-RL go by."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_dump.integrations.nemo_rl_host import probe
from tests.nemo_rl.host import TRAINERS

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from record_signatures import RECORD, parameters

pytestmark = pytest.mark.nemo_rl


def test_the_adapter_knows_this_checkout(nemo_rl_folder):
    probe()
    if "grpo_train_sync" in TRAINERS:
        probe(transfer_queue=True)
    else:
        with pytest.raises(RuntimeError, match=r"grpo_sync:calculate_baseline_and_std_per_prompt is missing"):
            probe(transfer_queue=True)


def test_the_record_knows_this_checkout(nemo_rl_folder):
    """If not: python tools/record_signatures.py --nemo-rl … --version main, then `make test`."""
    versions = json.loads(RECORD.read_text(encoding="utf-8"))["versions"]
    assert any(
        signatures == {name: parameters(nemo_rl_folder, name) for name in signatures}
        for signatures in (entry["signatures"] for entry in versions.values())
    )
