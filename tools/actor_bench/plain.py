"""The same optimizer step in plain PyTorch: transformers' model, its SDPA attention, torch's AdamW."""

from __future__ import annotations

import pathlib

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from actor_bench.problem import KL_PENALTY, LEARNING_RATE
from megatron_dump import grpo
from megatron_dump.actor.batching import MicroBatch

_LOSS = grpo.LossOptions(kl_penalty=KL_PENALTY)


def load_transformers(path: pathlib.Path) -> Qwen2ForCausalLM:
    """transformers' model with SDPA attention, in fp32.

    Not by from_pretrained: in a process that has joined torch.distributed, transformers 5.23 leaves the rotary
    frequencies, which no file holds, without a value.
    """
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(path, attn_implementation="sdpa"))
    missing, unexpected = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # tied, so that the file has it once
        raise ValueError(f"{path}/model.safetensors: missing {missing}, unexpected {unexpected}")
    return model


class PlainStep:
    """One optimizer step a call; `sampled_only`: the output layer sees only states in front of a sampled token."""

    def __init__(self, path: pathlib.Path, device: torch.device, sampled_only: bool, dtype: torch.dtype) -> None:
        self.model = load_transformers(path).to(device).train()
        for parameter in self.model.parameters():  # not the rotary frequencies
            parameter.data = parameter.data.to(dtype)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.01
        )
        self.sampled_only = sampled_only

    def __call__(self, micros: list[MicroBatch], global_tokens: float) -> tuple[float, float]:
        """Loss and gradient norm."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=micros[0].tokens.device)
        for micro in micros:
            logprobs = self._logprobs(micro)
            loss, _ = grpo.policy_loss(
                logprobs,
                logprobs.detach(),
                micro.advantages,
                micro.mask,
                global_tokens,
                _LOSS,
                ref_logprobs=micro.ref_logprobs,
            )
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(total), float(norm)

    def _logprobs(self, micro: MicroBatch) -> Tensor:
        """[B, T], column 0 is 0. Right-padded rows need no attention mask."""
        tokens = micro.tokens
        if not self.sampled_only:
            logits = self.model(tokens, use_cache=False).logits[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            return torch.cat([chosen.new_zeros(len(tokens), 1), chosen], 1)
        hidden = self.model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = self.model.lm_head(hidden[micro.sampled - 1]).float()
        chosen = logits.log_softmax(-1).gather(-1, tokens.flatten()[micro.sampled][:, None])[:, 0]
        return chosen.new_zeros(tokens.numel()).index_copy(0, micro.sampled, chosen).view_as(tokens)
