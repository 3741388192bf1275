"""The keyword arguments of vllm.LLM: the user's under vLLM's names, and what this package sets or needs."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Mapping
from typing import Any

from megatron_dump.rollout.engine import EngineRefused

_KEY = "trainer.grpo.inference_backend.vllm"
_OURS = {  # what rollouts stand on
    "model": "it is pretrained_checkpoint.restore_from_path",
    "tokenizer": "prompts and completions are token ids",
    "skip_tokenizer_init": "prompts and completions are token ids",
    "logprobs_mode": "log-probabilities are the trainer's, before top-k and top-p",
    "generation_config": "sampling is model.grpo.sampling_params",
    "worker_extension_cls": "weights are loaded through it",
    "runner": "the engine generates",
    "seed": "each completion has its own",
    "enable_sleep_mode": "it is on where the platform has it",
}
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
_CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",  # ranks and engines share the cores; unset, it is many times slower on a busy machine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound, all engines of a machine would sit on the same cores
}
_BLOCK = 32  # tokens of a cache block on CPU: the smallest, so that more of a prompt is shared
_CPU_CACHE = 256 << 20  # bytes


def engine_environment(on_cpu: bool) -> dict[str, str]:
    """Variables that a vLLM process must start with; those that are set here stay as they are."""
    wanted = {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if on_cpu else {})}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def llm_arguments(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What vllm.LLM gets. EngineRefused for options that it does not know or that are not the user's to set."""
    import vllm
    from vllm.platforms import current_platform

    known = {f.name for f in dataclasses.fields(vllm.EngineArgs)} | inspect.signature(vllm.LLM).parameters.keys()
    known -= {"self", "kwargs"}
    for name, value in options.items():
        if name in _OURS:
            raise EngineRefused(f"{_KEY}.{name}={value}: not to be set, {_OURS[name]}; remove it")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"it knows {', '.join(sorted(known - _OURS.keys()))}"
            )
            raise EngineRefused(f"{_KEY}.{name}: unknown to vLLM {vllm.__version__}; {hint}")
    arguments = {
        "model": model,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the folder's would add its own stop tokens
        "logprobs_mode": "raw_logprobs",
        "worker_extension_cls": "megatron_dump.rollout.vllm_worker.WeightLoader",
        "load_format": "dummy",  # the first push brings the weights
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        return {**arguments, **_on_cpu(model, options)}
    return {**arguments, "enable_sleep_mode": current_platform.is_sleep_mode_available(), **options}


def _on_cpu(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    if options.get("enable_chunked_prefill"):
        raise EngineRefused(
            f"{_KEY}.enable_chunked_prefill=true: on a CPU vLLM cannot cut a prompt whose completion has a seed; "
            "remove it"
        )
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    longest = int(options.get("max_model_len") or config.max_position_embeddings)
    defaults = {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, longest, int(options.get("max_num_seqs") or 0)),
        "block_size": _BLOCK,
        "kv_cache_memory_bytes": _CPU_CACHE,
        "distributed_executor_backend": "uni" if options.get("tensor_parallel_size", 1) == 1 else "mp",
    }
    overrides = dict(options.get("hf_overrides") or {})
    if config.tie_word_embeddings:  # vLLM repacks lm_head on a CPU, and a reload would leave the copy stale
        overrides["tie_word_embeddings"] = False
    return {**defaults, **options, "hf_overrides": overrides}
