"""What runs on this node, and what it has left."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
from importlib import metadata

import psutil
import torch

import megatron_dump

PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
_DRIVER = pathlib.Path("/proc/driver/nvidia/version")


def versions(script: pathlib.Path) -> dict[str, str]:
    """Of everything that must be the same on all nodes; `script` counts as part of megatron_dump's own code."""
    found = {"Python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    found["megatron_dump's code"] = code_digest(pathlib.Path(megatron_dump.__file__).parent, script)
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        if _DRIVER.exists() and (number := re.search(r"\s(\d+\.[\d.]+)\s", _DRIVER.read_text())):
            found["driver"] = number[1]
        found["GPU"] = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}))
    return found


def code_digest(package: pathlib.Path, *more: pathlib.Path) -> str:
    """The beginning of a SHA-256 over the Python files of a package, names and contents, and over `more`."""
    digest = hashlib.sha256()
    for path in [*sorted(package.rglob("*.py")), *more]:
        name = path.relative_to(package).as_posix() if path.is_relative_to(package) else path.name
        contents = path.read_bytes()
        digest.update(f"{name} {len(contents)}\n".encode() + contents)
    return digest.hexdigest()[:12]


def gpus() -> tuple[list[str], list[int]]:
    """Models and bytes in use of the GPUs that a process started here would see."""
    if not torch.cuda.is_available():
        return [], []
    numbers = range(torch.cuda.device_count())
    memory = [torch.cuda.mem_get_info(i) for i in numbers]
    return [torch.cuda.get_device_name(i) for i in numbers], [total - free for free, total in memory]


def memory_available() -> int:
    """Bytes that new processes may take, under the limit of this control group if that is lower."""
    available = psutil.virtual_memory().available
    return min([available, *_group_limits()])


def _group_limits() -> list[int]:
    """What control groups (version 2) from this process's own to the root leave; [] without limits."""
    own = next((line[3:] for line in _lines("/proc/self/cgroup") if line.startswith("0::")), None)
    left: list[int] = []
    if own is None:
        return left
    folder = pathlib.Path("/sys/fs/cgroup" + own)
    for group in (folder, *folder.parents):
        limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
        if limit and used and limit[0].isdigit():
            cache = sum(
                int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith("inactive_file")
            )
            left.append(int(limit[0]) - int(used[0]) + cache)
    return left


def _lines(path: str | pathlib.Path) -> list[str]:
    return pathlib.Path(path).read_text().splitlines() if os.path.isfile(path) else []


def free(folder: str | pathlib.Path) -> int:
    """Bytes that a file there may still take."""
    return psutil.disk_usage(str(folder)).free
