"""What fills in for kernels that are not installed, decided by what megatron-core found, not by names of packages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# On a machine whose only GPU is one that torch.cuda claims to have.
ENABLED = """
import torch
import megatron.core.optimizer as optimizer
import megatron.core.optimizer.distrib_optimizer as distributed
import megatron.core.transformer.moe.moe_utils as moe_utils
from megatron_dump.actor import platform
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 1, lambda rank: None
for _ in range(2):  # what the first call put in is no kernel, and none to the second
    assert platform.enable().device.type == "cuda"
assert optimizer.Adam is distributed.Adam and not optimizer.USING_PYTORCH_OPTIMIZER and distributed.HAVE_APEX_OR_TE
assert moe_utils.te_general_gemm is None
print(f"{optimizer.Adam.__module__}.{optimizer.Adam.__name__}")
"""
OURS = "megatron_dump.actor.adam.GroupStepAdam"
OPTIMIZERS = "class FusedAdam: ...\nclass FusedSGD: ...\n"


@pytest.mark.parametrize(
    ("files", "adam"),
    [
        ({"apex/__init__.py": "def includeme(config): ...\n"}, OURS),
        ({"apex/__init__.py": "import a_web_framework\n"}, OURS),
        ({"apex/__init__.py": "", "apex/optimizers.py": OPTIMIZERS}, "apex.optimizers.FusedAdam"),
    ],
    ids=["PyPI's apex", "PyPI's apex without what it imports", "NVIDIA's Apex"],
)
def test_our_adam_stands_in_unless_there_is_a_fused_one(files, adam, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENABLED],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == adam
