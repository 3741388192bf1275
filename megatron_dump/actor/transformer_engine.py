"""Is Transformer Engine there? Known without importing it, or megatron-core."""

from __future__ import annotations

import importlib.util

import torch


def transformer_engine_runs() -> bool:
    """Is Transformer Engine installed, and a GPU there for it?"""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
