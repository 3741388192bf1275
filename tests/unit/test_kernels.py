"""What fills in for kernels that are not installed, decided by what megatron-core found, not by names of packages."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ON_CPU = """
from megatron_dump.actor import platform
import megatron.core.optimizer as optimizer
import megatron.core.optimizer.clip_grads as clip_grads
assert clip_grads.l2_norm_impl == "a kernel"
platform.enable()
for found in (optimizer.Adam, clip_grads.l2_norm_impl, clip_grads.multi_tensor_applier):
    print(f"{found.__module__}.{found.__name__}")
"""
# On a machine whose only GPU is one that torch.cuda claims to have.
ON_GPU = """
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
APEX = {
    "apex/__init__.py": "",
    "apex/optimizers.py": "class FusedAdam: ...\nclass FusedSGD: ...\n",
    "apex/multi_tensor_apply.py": "multi_tensor_applier = None\n",
    "amp_C.py": "multi_tensor_scale = multi_tensor_l2norm = 'a kernel'\n",
}


def _run(program: str, files: dict[str, str], folder: pathlib.Path) -> list[str]:
    """What a program prints where these modules are installed."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    path = os.pathsep.join([str(folder), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("files", "adam"),
    [
        ({"apex/__init__.py": "def includeme(config): ...\n"}, OURS),
        ({"apex/__init__.py": "import a_web_framework\n"}, OURS),
        (APEX, "apex.optimizers.FusedAdam"),
    ],
    ids=["PyPI's apex", "PyPI's apex without what it imports", "NVIDIA's Apex"],
)
def test_our_adam_stands_in_unless_there_is_a_fused_one(files, adam, tmp_path):
    assert _run(ON_GPU, files, tmp_path)[-1] == adam


def test_a_cpu_uses_no_kernel_that_is_installed(tmp_path):
    found = _run(ON_CPU, APEX, tmp_path)
    assert found[-3:] == [OURS, *(f"megatron.core.utils.local_multi_tensor_{x}" for x in ("l2_norm", "applier"))]
