"""Layouts that cannot run are refused before anything starts, in one line: key, value, reason, remedy."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig, Qwen3MoeConfig

from megatron_dump import config as schema
from megatron_dump.actor.architecture import read_architecture
from megatron_dump.actor.layout import Layout, check_layout, check_model, check_run, layout_of

SIZES = dict(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
KEYS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "sp": "sequence_parallel",
}


def _config(reshard: bool | str = False, **keys) -> schema.Config:
    return schema.load(
        OmegaConf.create(
            {
                "trainer": {"grpo": {"inference_backend": {"reshard": reshard}}},
                "pretrained_checkpoint": {"restore_from_path": "none"},
                "model": {
                    "data": {"train_files": ["none"]},
                    **{KEYS.get(key, key): value for key, value in keys.items()},
                },
                "exp_manager": {"explicit_log_dir": "none"},
            }
        )
    )


def _layout(**keys) -> Layout:
    return layout_of(_config(**keys).model)


def test_a_layout_is_read_from_the_configuration():
    layout = _layout(tp=2, pp=4, vpp=3, cp=2, ep=2, etp=1, sp=True)
    assert layout == Layout(2, 4, 3, 2, 2, 1, True)
    assert layout.replica_size == 16
    assert layout.length_unit == 8  # tensor ranks × two chunks a context rank
    assert layout.micro_batch_unit == 4
    assert _layout(tp=4, cp=2).length_unit == 4  # without sequence parallelism each tensor rank has all its tokens
    assert _layout(tp=4).expert_tensor == 4  # Megatron's default
    assert (Layout().replica_size, Layout().length_unit, Layout().micro_batch_unit) == (1, 1, 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vpp": 2}, r"virtual_pipeline_model_parallel_size=2: .*pipeline_model_parallel_size of at least 2; set it"),
        ({"pp": 2, "vpp": 1}, r"virtual_pipeline_model_parallel_size=1: .*; set it to null"),
        ({"sp": True}, r"sequence_parallel=true: .*tensor_model_parallel_size=1; set it to false"),
        ({"cp": 0}, r"context_parallel_size=0: must be above 0"),
        ({"vpp": -2, "pp": 2}, r"virtual_pipeline_model_parallel_size=-2: must be above 0"),
        ({"transformer_impl": "te"}, r"transformer_impl=te: known are auto, local, transformer_engine"),
        ({"recompute_granularity": "all"}, r"recompute_granularity=all: known are null, full, selective"),
        ({"recompute_granularity": "full"}, r"recompute_granularity=full needs model\.recompute_method: uniform with"),
        (
            {"recompute_granularity": "selective", "recompute_num_layers": 1},
            r"recompute_num_layers=1 belongs to model\.recompute_granularity=full, which is selective: set it to full",
        ),
        ({"moe_aux_loss_coeff": -1.0}, r"moe_aux_loss_coeff=-1\.0: must not be negative"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, message):
    with pytest.raises(schema.ConfigError, match=r"^model\." + message):
        _layout(**keys)


def test_split_experts_on_expert_ranks_are_refused_on_gloo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _layout(tp=2, sp=True, ep=4).expert_tensor == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(schema.ConfigError, match=r"expert_tensor_parallel_size=2: gloo.*size=4; set it to 1"):
        _layout(tp=2, sp=True, ep=4)


@pytest.mark.parametrize(
    ("layout", "world", "message"),
    [
        (
            Layout(tensor=2, pipeline=2, context=2),
            12,
            r"tensor_model_parallel_size=2 × model\.pipeline_model_parallel_size=2 × model\.context_parallel_size=2 = "
            r"8 ranks a replica, .* world size 12: start 8 or 16 ranks",
        ),
        (Layout(tensor=4), 2, r"= 4 ranks a replica, .* world size 2: start 4 ranks"),
        (
            Layout(pipeline=2, expert=4),
            12,
            r"expert_model_parallel_size=4 × .*=1 = 4 does not divide the 6 ranks of a pipeline stage \(world size 12",
        ),
    ],
)
def test_the_world_must_fit_the_layout(layout, world, message):
    with pytest.raises(ValueError, match=message):
        check_layout(layout, world)


def test_data_parallel_ranks_are_what_is_left():
    assert check_layout(Layout(tensor=2, pipeline=2, context=2, expert=2, sequence=True), 16) == 2
    assert check_layout(Layout(expert=4), 8) == 8  # expert ranks are among the data-parallel ones


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=4), r"tensor_model_parallel_size=4 does not divide the model's 2 key/value heads: lower it"),
        (
            Layout(pipeline=2, virtual_pipeline=2),
            r"pipeline_model_parallel_size=2 × .*virtual_pipeline_model_parallel_size=2 = 4 .* 6 layers: choose",
        ),
        (Layout(expert=2), r"expert_model_parallel_size=2: llama has no experts; set it to 1"),
    ],
)
def test_the_layout_must_fit_the_model(tmp_path, layout, message):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    arch = read_architecture(str(tmp_path), 8, 1)
    check_model(arch, Layout(tensor=2, pipeline=3, virtual_pipeline=2, context=2))
    with pytest.raises(ValueError, match=message):
        check_model(arch, layout)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(expert=4), r"expert_model_parallel_size=4 does not divide the model's 6 experts: choose a divisor"),
        (Layout(tensor=2), r"sequence_parallel=false: .* tensor_model_parallel_size=2 .*; set it to true"),
    ],
)
def test_the_layout_must_fit_the_experts(tmp_path, layout, message):
    Qwen3MoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2, mlp_only_layers=[1]).save_pretrained(tmp_path)
    arch = read_architecture(str(tmp_path), 8, 1)
    assert arch.experts is not None and arch.experts.sparse == (True, False, True, True, True, True)
    check_model(arch, Layout(expert=3, tensor=2, sequence=True))
    with pytest.raises(ValueError, match=message):
        check_model(arch, layout)


def test_a_router_that_megatron_does_not_have_is_refused(tmp_path):
    Qwen3MoeConfig(**SIZES, num_experts_per_tok=1, norm_topk_prob=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="norm_topk_prob with num_experts_per_tok=1"):
        read_architecture(str(tmp_path), 8, 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pp": 2, "vpp": 2}, r"virtual_pipeline_model_parallel_size=2: .*reshard=true"),
        ({"cp": 2}, r"context_parallel_size=2: .*reshard=true"),
    ],
)
def test_generation_that_cannot_be_split_needs_copies(keys, message):
    common = {"micro_batch_size": 2, "global_batch_size": 16, **keys}
    config = _config(**common)
    with pytest.raises(schema.ConfigError, match=message):
        check_run(config, layout_of(config.model), 2, has_experts=False)
    for reshard in (True, "auto", "pipeline"):
        check_run(_config(reshard=reshard, **common), layout_of(config.model), 2, has_experts=False)


@pytest.mark.parametrize("keys", [{"tp": 2, "pp": 2, "sp": True}, {"ep": 2}, {"ep": 2, "tp": 2, "sp": True, "etp": 1}])
def test_generation_may_be_split_over_tensor_ranks_stages_and_experts(keys):
    config = _config(**keys)
    check_run(config, layout_of(config.model), 2, has_experts="ep" in keys)


def test_copies_that_keep_the_tensor_split_take_no_experts():
    config = _config(reshard="pipeline", pp=2)
    with pytest.raises(schema.ConfigError, match=r"reshard=pipeline: the model has experts; set it to true, false or"):
        check_run(config, layout_of(config.model), 2, has_experts=True)


@pytest.mark.parametrize("reshard", [None, "yes", 2])
def test_an_unknown_way_to_reshard_is_refused(reshard):
    with pytest.raises(schema.ConfigError, match=rf"reshard={reshard}: known are true, false, auto and pipeline"):
        _config(reshard=reshard)


@pytest.mark.parametrize("key", ["micro_batch_size", "grpo"])
def test_an_interleaved_pipeline_needs_whole_rounds_of_micro_batches(key):
    size = {"micro_batch_size": 8} if key != "grpo" else {"grpo": {"forward_micro_batch_size": 8}}
    config = _config(reshard=True, pp=2, vpp=2, global_batch_size=16, **size)
    message = r"micro_batch_size=8 cuts the 8 rollouts .* into 1 micro-batches; .* multiple of .*=2: change it"
    with pytest.raises(schema.ConfigError, match=message):
        check_run(config, layout_of(config.model), 2, has_experts=False)


def test_an_interleaved_pipeline_takes_no_dynamic_micro_batches():
    config = _config(reshard=True, pp=2, vpp=2, micro_batch_size=1, dynamic_batching={"enabled": True})
    with pytest.raises(schema.ConfigError, match=r"dynamic_batching\.enabled=true: .*=2\) takes micro-batches of one"):
        check_run(config, layout_of(config.model), 1, has_experts=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cp": 2}, r"not with model\.context_parallel_size=2: .*; set it to 1, or share_prompts to false"),
        ({"pp": 2, "vpp": 2, "micro_batch_size": 1}, r"virtual_pipeline_model_parallel_size=2: .*; set it to null"),
        ({"moe_aux_loss_coeff": 0.1}, r"model\.moe_aux_loss_coeff=0\.1: .*; set it to 0"),
        ({"moe_z_loss_coeff": 0.1}, r"model\.moe_z_loss_coeff=0\.1: .*; set it to null"),
    ],
)
def test_shared_prompts_are_refused_where_rollouts_must_be_rows_by_themselves(keys, message):
    common = {"reshard": True, "global_batch_size": 16, **keys}
    config = _config(**common, share_prompts=True)
    with pytest.raises(schema.ConfigError, match=rf"model\.share_prompts=true: .*{message}"):
        check_run(config, layout_of(config.model), 2, has_experts=True)
    check_run(_config(**common), layout_of(config.model), 2, has_experts=True)


def test_shared_prompts_go_with_the_other_layouts_and_with_router_losses_that_do_not_exist():
    config = _config(tp=2, pp=2, sp=True, share_prompts=True, moe_aux_loss_coeff=0.1)
    check_run(config, layout_of(config.model), 2, has_experts=False)
