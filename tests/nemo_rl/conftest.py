"""NeMo-RL from the checkout that NEMO_RL_DIR names, and a Ray for what it hands from one part to another."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
import types

import pytest


def _stand_in_for_megatron() -> None:
    """v0.6's losses import these names on their first lines. The tests compute no loss, so nothing calls them."""
    names = {
        "models.gpt": ["GPTModel"],
        "parallel_state": [
            "get_context_parallel_group",
            "get_context_parallel_world_size",
            "get_tensor_model_parallel_group",
            "get_tensor_model_parallel_rank",
        ],
        "utils": ["deprecate_inference_params", "get_pg_size"],
    }
    for package in ("megatron", "megatron.core", "megatron.core.models"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    for name, members in names.items():
        module = types.ModuleType(f"megatron.core.{name}")
        module.__dict__.update({member: type(member, (), {}) for member in members})
        sys.modules[module.__name__] = module


@pytest.fixture(scope="session")
def nemo_rl_folder():
    """The checkout, importable from here on."""
    folder = pathlib.Path(os.environ["NEMO_RL_DIR"]).resolve()
    sys.path.insert(0, str(folder))
    if importlib.util.find_spec("nemo_rl.algorithms.grpo_sync") is None:  # v0.6
        _stand_in_for_megatron()
    return folder


@pytest.fixture(scope="session")
def ray_session():
    """NeMo-RL's loop takes rewards and refits through Ray; its TransferQueue has two actors."""
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}  # processes nobody wants
    os.environ |= {"RAY_raylet_start_wait_time_s": "300"}  # a busy machine takes more than Ray's minute
    context = ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20)
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]  # NeMo-RL asks for "auto": not another Ray nearby
    yield
    ray.shutdown()
