"""What is measured as JSON files of one folder, and where it was measured."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from typing import Any

import torch


def write_json(path: pathlib.Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: pathlib.Path, option: str) -> Any:
    """ValueError, one line that names `option`, for a file that is not there or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{option}: there is no {path}") from None
    except ValueError as error:
        raise ValueError(f"{option}: {path} is no JSON: {error}") from None


def machine() -> dict[str, Any]:
    """Of this process's node."""
    import megatron.core

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "cuda": torch.cuda.is_available(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
    }


def machine_line(found: dict[str, Any]) -> str:
    where = found["device"] if found["cuda"] else f"{found['device']}, {found['cores']} cores, no GPU"
    return (
        f"{where}; load {found['load']} at the end; Python {found['python']}, torch {found['torch']}, "
        f"megatron-core {found['megatron_core']}"
    )
