"""Small random Hugging Face folders of every supported model family, and Megatron modules that hold them."""

from __future__ import annotations

import pathlib

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_dump.actor import convert, parallel
from megatron_dump.actor.architecture import Architecture, read_architecture
from megatron_dump.actor.model import build_model, transformer_config

_SIZES = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=22,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10, norm_topk_prob=True)
FAMILIES = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 10}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen3-moe": (
        "qwen3_moe",
        {**_EXPERTS, "head_dim": 10, "mlp_only_layers": [1]},
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 14},
    ),
}
DENSE = [name for name in FAMILIES if not name.endswith("moe")]


def write_family(
    path: pathlib.Path, family: str, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "5GB", **sizes
) -> PreTrainedModel:
    """Random weights with a generation_config.json and a stand-in for a tokenizer."""
    torch.manual_seed(len(family))
    model_type, options = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**_SIZES, **options, **sizes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # transformers starts them at 1 and 0, which would hide mistakes
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    (path / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return model


def tensors(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Everything in the folder's safetensors files, read by safetensors itself."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def build(path, precision="32", **sizes) -> tuple[list[torch.nn.Module], Architecture, parallel.Parallel]:
    """This rank's modules with a folder's weights, and what else the functions of `convert` want."""
    grid = parallel.initialize(parallel.Layout(**sizes, sequence=sizes.get("tensor", 1) > 1), timeout_s=60)
    arch = read_architecture(str(path), 8, grid.tensor_size)
    config = transformer_config(arch, grid, precision)
    modules = [build_model(arch, config, grid, chunk=i) for i in range(sizes.get("virtual_pipeline") or 1)]
    convert.load_hf(modules, arch, grid, str(path))
    return modules, arch, grid
