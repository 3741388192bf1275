"""Weights of Transformer Engine's layers have names and shapes that the conversion turns into a Hugging Face model.

Against what Transformer Engine's sources declare (recorded_signatures/transformer_engine.json, read from them by
record_te_parameters.py). `make test-te` builds the layers themselves.
"""

from __future__ import annotations

import json

import pytest

from megatron_dump.actor.architecture import Architecture, read_architecture
from megatron_dump.actor.weight_map import WeightMap
from tests.distributed.families import FAMILIES, tensors, write_family
from tests.unit.record_te_parameters import RECORD, declared

DECLARED = json.loads(RECORD.read_text())["parameters"]
Shapes = dict[str, tuple[int, ...]]


def _linear(layer: str, n_in: int, n_out: int, bias: bool = False, experts: int = 0) -> Shapes:
    """A linear layer whose norm, if it has one, is RMSNorm: there are no biases of norms."""
    features = {"in_features": n_in, "out_features": n_out}
    shapes = {}
    for name, sizes in DECLARED[layer].items():
        if name != "layer_norm_bias" and (bias or not name.startswith("bias")):
            for i in range(experts or 1):
                shapes[name.replace("{i}", str(i))] = tuple(features[size] for size in sizes)
    return shapes


def _norm(size: int) -> Shapes:
    return {name: tuple({"normalized_shape": size}[s] for s in sizes) for name, sizes in DECLARED["RMSNorm"].items()}


def _layer(arch: Architecture, is_sparse: bool, tensor: int) -> dict[str, Shapes]:
    """A rank's modules where `tensor` ranks share a layer, and every expert; its router is megatron-core's own."""
    hf, experts = arch.hf, arch.experts
    width, heads = hf.hidden_size, hf.num_attention_heads * arch.head_dim // tensor
    groups = hf.num_key_value_heads * arch.head_dim // tensor
    modules = {
        "self_attention.linear_qkv": _linear("LayerNormLinear", width, heads + 2 * groups, arch.qkv_bias),
        "self_attention.linear_proj": _linear("Linear", heads, width),
    }
    if arch.qk_layernorm:
        modules |= {f"self_attention.{x}_layernorm": _norm(arch.head_dim) for x in "qk"}
    if experts is None or not is_sparse:
        inner = hf.intermediate_size // tensor
        return modules | {
            "mlp.linear_fc1": _linear("LayerNormLinear", width, 2 * inner),
            "mlp.linear_fc2": _linear("Linear", inner, width),
        }
    inner = experts.intermediate_size // tensor
    modules |= {
        "pre_mlp_layernorm": _norm(width),
        "mlp.router": {"weight": (experts.number, width)},
        "mlp.experts.linear_fc1": _linear("GroupedLinear", width, 2 * inner, experts=experts.number),
        "mlp.experts.linear_fc2": _linear("GroupedLinear", inner, width, experts=experts.number),
    }
    if experts.shared_intermediate_size is not None:
        inner = experts.shared_intermediate_size // tensor
        modules |= {
            "mlp.shared_experts.linear_fc1": _linear("Linear", width, 2 * inner),
            "mlp.shared_experts.linear_fc2": _linear("Linear", inner, width),
            "mlp.shared_experts": {"gate_weight": (1, width)},
        }
    return modules


def _model(arch: Architecture, tensor: int) -> Shapes:
    vocabulary = (arch.padded_vocab_size // tensor, arch.hf.hidden_size)
    shapes = {"embedding.word_embeddings.weight": vocabulary}
    if not arch.tied:
        shapes["output_layer.weight"] = vocabulary
    modules = {"decoder.final_layernorm": _norm(arch.hf.hidden_size)}
    for i in range(arch.hf.num_hidden_layers):
        layer = _layer(arch, arch.experts is not None and arch.experts.sparse[i], tensor)
        modules |= {f"decoder.layers.{i}.{name}": parameters for name, parameters in layer.items()}
    return shapes | {f"{module}.{name}": shape for module, own in modules.items() for name, shape in own.items()}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_sources_declare_makes_every_tensor_of_the_hugging_face_model_once(family, tensor, tmp_path):
    write_family(tmp_path, family)
    arch = read_architecture(str(tmp_path), 8, tensor)
    weights, found = WeightMap(arch), []
    for name, shape in _model(arch, tensor).items():
        rule = weights.rule(name)
        found += zip(rule.hf_names, rule.hf_shapes(shape, tensor), strict=True)
    assert sorted(found) == sorted((name, tuple(t.shape)) for name, t in tensors(tmp_path).items())


def test_parameters_are_read_from_a_constructor():
    source = """
class Layer(Base):
    def __init__(self, n, device):
        self.names = []
        if n:
            self.names = ["weight"]
        big = torch.empty(self.n_out, n, device=device)
        self.register_parameter(self.names[0], torch.nn.Parameter(big[0:n]), init_fn=f)
        scale = torch.nn.Parameter(torch.empty(n))
        self.register_parameter("scale", scale)
        for i in range(n):
            self.register_parameter(f"part{i}", torch.nn.Parameter(torch.empty(n, self.n_out)))

    def later(self):
        self.register_parameter("later", None)
"""
    assert declared(source, "Layer") == {"weight": ["n_out", "n"], "scale": ["n"], "part{i}": ["n", "n_out"]}
