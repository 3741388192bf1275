"""What of a module is in a checkpoint: its weights, not what Transformer Engine keeps beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_dump.actor.weights_checkpoint import load_state, sharded_weights


class _Norm(nn.RMSNorm):
    """With an entry beside its weight, as Transformer Engine's modules have one."""

    scales = 0

    def get_extra_state(self):
        return self.scales

    def set_extra_state(self, state):
        self.scales = state


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = _Norm(3)

    sharded_state_dict = nn.Module.state_dict


def test_a_checkpoint_without_these_entries_is_loaded_and_one_without_a_weight_is_not():
    source, target = _Model(), _Model()
    source.norm.weight.data.fill_(2)
    target.norm.scales = 5
    state = sharded_weights(source)
    assert list(state) == ["norm.weight"]
    load_state(target, state)
    assert torch.equal(target.norm.weight, source.norm.weight) and target.norm.scales == 5
    with pytest.raises(RuntimeError, match="norm.weight"):
        load_state(target, {})
