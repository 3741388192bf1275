"""Generator states of a rank: Python's, numpy's, torch's and megatron-core's tracker.

Draws, sampling and initialisation are functions of (seed, step) and dropout is off, so no generator state decides how
a run of this package goes on. They are kept for what a user plugs in and runs in the rank itself: a generator, a reward
function with `workers: 0`, a model with dropout or router jitter (megatron-core's tracker).
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def capture() -> dict[str, Any]:
    """JSON-serialisable."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - others use the global one
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "python": [version, list(words), gauss],
        "numpy": [np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "megatron": {name: _encode(state) for name, state in tracked.items()},
    }


def restore(state: dict[str, Any]) -> None:
    """The inverse of `capture`; a CUDA state is left alone on a machine without CUDA, and the reverse."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(_decode(state["torch"]))
    if (state["cuda"] is not None) != torch.cuda.is_available():
        return
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(_decode(state["cuda"]))
    tensor_parallel.get_cuda_rng_tracker().set_states({n: _decode(s) for n, s in state["megatron"].items()})


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
