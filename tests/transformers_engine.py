"""An engine (rollout/engine.py) over a Hugging Face model: a plain loop with a KV cache, for tests without vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dump.rollout.engine import EngineOutput, EngineRequest
from megatron_dump.rollout.sampling import SamplingOptions, pick_tokens

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class TransformersEngine:
    """Samples from a Hugging Face folder's model in fp32 until `load_weights` brings others.

    The i-th token of a completion is drawn by inverting the distribution function at the i-th double of
    numpy's Philox, seeded with the completion's seed.
    """

    def __init__(
        self,
        path: str,
        max_length: int,
        stop_ids: Sequence[int],
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        version: int = 0,  # of the folder's weights
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        self.options = SamplingOptions(max_length, tuple(stop_ids), temperature, top_k, top_p)
        self.version, self.asleep = version, False

    def close(self) -> None: ...

    @torch.no_grad()
    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        if self.asleep or self.version < 0:
            raise RuntimeError("the engine is asleep or has no weights: wake it and load weights")
        return [self._group(request) for request in requests]

    def _group(self, request: EngineRequest) -> list[EngineOutput]:
        """All completions of a prompt: prefilled once, then a batch that grows by a token at a time."""
        n, longest, stops = len(request.seeds), self.options.max_length, torch.tensor(self.options.stop_ids)
        uniforms = np.stack([np.random.Generator(np.random.Philox(seed)).random(longest) for seed in request.seeds])
        out = self.model(torch.from_numpy(np.asarray(request.prompt, np.int64))[None], use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].expand(n, -1)
        cache.batch_repeat_interleave(n)
        tokens, logprobs, ended = [], [], torch.zeros(n, dtype=torch.bool)
        for i in range(longest):
            token, logprob = pick_tokens(logits, torch.from_numpy(uniforms[:, i]), self.options)
            tokens.append(token)
            logprobs.append(logprob)
            ended = ended | torch.isin(token, stops)
            if ended.all() or i == longest - 1:
                break
            out = self.model(token[:, None], past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1]
        stacked = zip(torch.stack(tokens, 1).numpy(), torch.stack(logprobs, 1).numpy(), strict=True)
        return [self._output(ids, values) for ids, values in stacked]

    def _output(self, ids: np.ndarray, logprobs: np.ndarray) -> EngineOutput:
        stops = np.flatnonzero(np.isin(ids, self.options.stop_ids))
        end = stops[0] + 1 if len(stops) else len(ids)
        return EngineOutput(ids[:end].copy(), logprobs[:end].copy(), len(stops) > 0, self.version)

    @torch.no_grad()
    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        places = dict(self.model.named_parameters())
        missing = set(places)
        for name, tensor in weights:
            place, into = _place(name)
            if place not in places:
                raise ValueError(f"{name}: the model has no such weight")
            into(places[place]).copy_(tensor)
            missing.discard(place)
        if missing:
            raise ValueError(f"no weights came for {sorted(missing)[:3]}")
        self.version = version

    @torch.no_grad()
    def sleep(self) -> None:
        self.asleep, self.version = True, -1
        for parameter in self.model.parameters():
            parameter.fill_(float("nan"))

    def wake(self) -> None:
        self.asleep = False


def _place(name: str):
    """The parameter that a tensor of the folder belongs to, and its part: transformers keeps experts side by side."""
    if (match := _EXPERT.fullmatch(name)) is None:
        return name, lambda parameter: parameter
    expert, kind = int(match[2]), match[3]
    if kind == "down":
        return f"{match[1]}.down_proj", lambda parameter: parameter[expert]
    return f"{match[1]}.gate_up_proj", lambda parameter: parameter[expert].chunk(2)[kind == "up"]
