"""The table of Megatron and Hugging Face names, for both layer specifications, without Transformer Engine."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import nn

from megatron_dump.actor.weight_map import WeightMap, named_parameters, with_expert

GROUPS, QUERIES, HEAD, WIDTH = 4, 3, 5, 7  # key/value heads, query heads of each, their size, hidden size


def weight_map(tied: bool = False) -> WeightMap:
    hf = SimpleNamespace(num_attention_heads=GROUPS * QUERIES, num_key_value_heads=GROUPS)
    return WeightMap(SimpleNamespace(hf=hf, head_dim=HEAD, vocab_size=61, tied=tied))


LAYER = {  # local name -> Hugging Face names
    "input_layernorm.weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "self_attention.linear_qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
}
DENSE = {
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}
SPARSE = {
    "mlp.router.weight": ["mlp.gate.weight"],
    "mlp.experts.local_experts.11.linear_fc1.weight": [f"mlp.experts.11.{x}_proj.weight" for x in ("gate", "up")],
    "mlp.experts.local_experts.11.linear_fc2.weight": ["mlp.experts.11.down_proj.weight"],
    "mlp.shared_experts.linear_fc1.weight": [f"mlp.shared_expert.{x}_proj.weight" for x in ("gate", "up")],
    "mlp.shared_experts.linear_fc2.weight": ["mlp.shared_expert.down_proj.weight"],
    "mlp.shared_experts.gate_weight": ["mlp.shared_expert_gate.weight"],
}


def fused(name: str, is_dense: bool) -> str:
    """Transformer Engine's name, by megatron-core's own table of what its local norms are there."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    for local, engine in layer.sharded_state_dict_keys_map.items():
        if name.startswith(local) and (is_dense or "mlp" not in engine):  # sparse layers keep the norm before them
            return engine + name.removeprefix(local)
    return re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name)


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "experts"])
def test_both_specifications_name_the_same_tensors(is_dense):
    weights, different = weight_map(), 0
    for name, hf_names in {**LAYER, **(DENSE if is_dense else SPARSE)}.items():
        for each in (name, fused(name, is_dense)):
            assert weights.rule(f"decoder.layers.12.{each}").hf_names == tuple(f"model.layers.12.{n}" for n in hf_names)
        different += name != fused(name, is_dense)
    assert different == (2 if is_dense else 3)


def test_names_outside_the_layers():
    for tied, head in ((True, "model.embed_tokens.weight"), (False, "lm_head.weight")):
        assert weight_map(tied).rule("output_layer.weight").hf_names == (head,)
    assert weight_map().rule("embedding.word_embeddings.weight").hf_names == ("model.embed_tokens.weight",)
    assert weight_map().rule("decoder.final_layernorm.weight").hf_names == ("model.norm.weight",)
    for name in ("decoder.layers.0.self_attention.linear_proj.bias", "mtp.layers.0.enorm.weight"):
        with pytest.raises(KeyError, match=re.escape(name)):
            weight_map().rule(name)


def _module(**children) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


@pytest.mark.parametrize("engine", [False, True], ids=["local", "transformer-engine"])
def test_layers_and_experts_are_numbered_over_the_whole_model(engine):
    """The second chunk of a stage, with experts 4 and 5 of 8."""
    weight = lambda: nn.Parameter(torch.zeros(1))  # noqa: E731
    if engine:
        experts = _module(linear_fc1=_module(weight0=weight(), weight1=weight()))
        expected = [f"decoder.layers.6.mlp.experts.linear_fc1.weight{i}" for i in (4, 5)]
    else:
        experts = _module(local_experts=nn.ModuleList(_module(linear_fc1=_module(weight=weight())) for _ in range(2)))
        expected = [f"decoder.layers.6.mlp.experts.local_experts.{i}.linear_fc1.weight" for i in (4, 5)]
    layer = _module(mlp=_module(experts=experts))
    layer.layer_number, layer.mlp.local_expert_indices = 7, [4, 5]  # megatron-core counts layers from 1
    chunk = _module(decoder=_module(layers=nn.ModuleList([layer])))
    assert [name for name, _ in named_parameters([chunk])] == expected
    assert with_expert(expected[0], 5) == expected[1]
    assert [weight_map().rule(name).expert for name in expected] == [4, 5]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_is_laid_out_head_by_head(size):
    """Against the layout written out: per key/value group its query heads, its key, its value; groups over ranks."""
    rule = weight_map().rule("decoder.layers.0.self_attention.linear_qkv.weight")
    q, k, v = (torch.randn(n * HEAD, WIDTH) for n in (GROUPS * QUERIES, GROUPS, GROUPS))
    rows = []
    for group in range(GROUPS):
        for head in range(group * QUERIES, (group + 1) * QUERIES):
            rows += list(q[head * HEAD : (head + 1) * HEAD])
        for tensor in (k, v):
            rows += list(tensor[group * HEAD : (group + 1) * HEAD])
    whole = torch.stack(rows)
    shards = whole.chunk(size)
    for rank, shard in enumerate(shards):
        assert torch.equal(rule.join([t.chunk(size)[rank] for t in (q, k, v)]), shard)
    assert torch.equal(rule.unshard(list(shards)), whole)
    assert all(torch.equal(a, b) for a, b in zip(rule.part(whole), (q, k, v), strict=True))
    assert rule.hf_shapes(shards[0].shape, size) == [tuple(t.shape) for t in (q, k, v)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_up_are_split_each_on_its_own(size):
    rule = weight_map().rule("decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    shards = [torch.cat([gate[r : r + 8 // size], up[r : r + 8 // size]]) for r in range(0, 8, 8 // size)]
    for rank, shard in enumerate(shards):
        assert torch.equal(rule.join([t.chunk(size)[rank] for t in (gate, up)]), shard)
    assert torch.equal(rule.unshard(shards), torch.cat([gate, up]))
    assert rule.hf_shapes(shards[0].shape, size) == [(8, WIDTH), (8, WIDTH)]
