"""Random models that vLLM can run, transformers' forward on them, and their way into an engine."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_dump.rollout.engine import EngineRequest
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.rollout.vllm_process import start_vllm
from megatron_dump.weight_sync.sync import WeightSync

VOCABULARY, STOPS = 67, (0, 5)


def write_model(path, seed: int = 0, tied: bool = True) -> Qwen2ForCausalLM:
    """As a Hugging Face folder, and as transformers has it."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        eos_token_id=STOPS[0],
        bos_token_id=None,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # HF starts them at 1 and 0, which would hide mistakes
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(path)
    return model.eval()


class Weights:
    """A transformers model as WeightSync wants it: every tensor whole on this rank."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        self.tensors = dict(model.named_parameters())  # a tied lm_head is not among them
        self.pieces = [
            (name, tuple(t.shape), str(t.dtype).removeprefix("torch."), i, 0, 0, t.shape[0])
            for i, (name, t) in enumerate(self.tensors.items())
        ]

    def read(self, index: int) -> torch.Tensor:
        return self.tensors[self.pieces[index][0]].detach()


class Served:
    """An engine in its process, and what pushes a model's weights to it."""

    def __init__(self, folder, model: Qwen2ForCausalLM, block=None, **sampling) -> None:
        self.model = model
        options = SamplingOptions(**{"max_length": 16, "stop_ids": STOPS, **sampling})
        defaults = {"dtype": "float32", "max_num_seqs": 64}
        log = folder / "engine.log"
        self.options = options
        self.handle = start_vllm(str(folder), options, block or {}, defaults, log, None, 300.0)
        self.sync = WeightSync(Weights(model), [self.handle])
        self.version = -1

    def push(self) -> int:
        """The model's present weights."""
        self.version += 1
        self.sync.push(self.version)
        return self.version

    def ask(self, requests):
        return self.handle.generate(requests).result(120)

    def close(self) -> None:
        self.handle.close()
        self.sync.close()


def requests(n_prompts: int = 6, seeds: int = 4, length: int = 45) -> list[EngineRequest]:
    """Prompts of all lengths up to `length`, every second one sharing its beginning with the one before."""
    rng = np.random.default_rng(3)
    asked: list[EngineRequest] = []
    for i in range(n_prompts):
        prompt = rng.integers(6, VOCABULARY, int(rng.integers(2, length)))
        if i % 2:
            prompt = np.concatenate([asked[-1].prompt[:33], prompt[:5]])
        asked.append(EngineRequest(prompt, tuple(2**62 + 1000 * i + 2**40 * s for s in range(seeds))))
    return asked


def logits(model: Qwen2ForCausalLM, prompt: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
    """[T, V]: of every token given what stands before it, in one forward pass."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens]))[None]
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : -1].float()


def worst_difference(model, asked, answers, temperature: float = 1.0) -> float:
    """The largest distance of a reported log-probability from transformers'."""
    worst = 0.0
    for request, group in zip(asked, answers, strict=True):
        for output in group:
            expected = torch.log_softmax(logits(model, request.prompt, output.token_ids) / temperature, -1)
            expected = expected.gather(-1, torch.from_numpy(output.token_ids.copy())[:, None])[:, 0].numpy()
            worst = max(worst, float(np.abs(expected - output.logprobs).max()))
    return worst


def plain(answers):
    return [[(o.token_ids.tolist(), o.finished, o.policy_version) for o in group] for group in answers]
