"""Tokens per second of our generation loop beside megatron-core's static engine, on one random model, one rank.

    python tools/benchmark_generation.py --prompts 8 --samples 8 --tokens 64

Both decode greedily; the tool says how many completions are equal. Written for megatron-core 0.16.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings

import numpy as np
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from omegaconf import OmegaConf
from transformers import Qwen2Config, Qwen2ForCausalLM

from kk.progress import each
from megatron_dump.actor import convert, model, parallel
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.config import load
from megatron_dump.rollout import Request
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.types import Prompt

VOCABULARY, WIDTH = 512, 256


class _Numbers:
    """The tokenizer that the static engine asks for: text is token numbers."""

    vocab_size, eod, bos = VOCABULARY, VOCABULARY - 1, 0

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int], **_: object) -> str:
        return " ".join(str(int(token)) for token in tokens)


def make_actor(path: str) -> MegatronGPTGRPOActor:
    torch.manual_seed(0)
    hf = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=_Numbers.eod,
        initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    Qwen2ForCausalLM(hf).save_pretrained(path)
    config = load(OmegaConf.create({
        "pretrained_checkpoint": {"restore_from_path": path}, "model": {"data": {"train_files": ["none"]}},
        "exp_manager": {"explicit_log_dir": "none"},
    }))  # fmt: skip
    return MegatronGPTGRPOActor(config, parallel.initialize())


def static_engine(actor: MegatronGPTGRPOActor, path: str, rows: int) -> StaticInferenceEngine:
    """megatron-core's engine on its own attention, with the same weights."""
    ours, model.block_spec = model.block_spec, lambda *_: get_gpt_layer_local_spec(normalization="RMSNorm")
    module = model.build_model(actor.arch, actor.transformer_config, actor.parallel)
    model.block_spec = ours
    module.rotary_pos_emb = module.rotary_pos_emb.rotary
    convert.load_hf([module], actor.arch, actor.parallel, path)
    settings = InferenceWrapperConfig(
        hidden_size=WIDTH, inference_batch_times_seqlen_threshold=-1, fp32_residual_connection=False,
        params_dtype=torch.float32, padded_vocab_size=VOCABULARY, inference_max_requests=rows,
        inference_max_seq_length=512,
    )  # fmt: skip
    wrapper = GPTInferenceWrapper(module.eval(), settings, StaticInferenceContext(rows, 512))
    controller = TextGenerationController(inference_wrapped_model=wrapper, tokenizer=_Numbers())
    return StaticInferenceEngine(controller, max_batch_size=rows, random_seed=1, legacy=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 8), ("samples", 8), ("tokens", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCABULARY - 12, 16) for _ in range(args.prompts)]
    requests = [Request(i, Prompt(i, "source", p, ""), args.samples) for i, p in enumerate(prompts)]
    texts = [" ".join(map(str, p)) for p in prompts for _ in range(args.samples)]
    with tempfile.TemporaryDirectory() as path:
        actor = make_actor(path)
        engine = static_engine(actor, path, len(texts))
        options = SamplingOptions(max_length=args.tokens, stop_ids=(_Numbers.eod,), use_greedy=True)
        loop = MegatronGenerator(actor, options, 0, len(texts), lambda ids: "")
        greedy = SamplingParams(temperature=1.0, top_k=1, num_tokens_to_generate=args.tokens)
        speeds: dict[str, list[float]] = {"our loop": [], "static engine": []}
        for _ in each(range(args.repeats), "rounds"):  # in turn: what else the machine does weighs on both
            start = time.perf_counter()
            ours = [c.token_ids.tolist() for c in loop.generate(0, requests)]
            middle = time.perf_counter()
            theirs = [
                list(map(int, r.generated_tokens)) for r in engine.generate(prompts=texts, sampling_params=greedy)
            ]
            end = time.perf_counter()
            speeds["our loop"].append(sum(map(len, ours)) / (middle - start))
            speeds["static engine"].append(sum(map(len, theirs)) / (end - middle))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, median in medians.items():
        print(f"{name:14s} {median:8.0f} tokens/s (median of {args.repeats})")
    same = sum(a == b[: len(a)] for a, b in zip(ours, theirs, strict=True))
    print(f"ratio {medians['our loop'] / medians['static engine']:.2f}; {same} of {len(ours)} completions equal")


if __name__ == "__main__":
    main()
