"""Where a run's completions come from, by `trainer.grpo.inference_backend`."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.whole import WholePolicy
from megatron_dump.config import Config, ConfigError
from megatron_dump.distributed import Replica
from megatron_dump.engines import Engines, start_engines
from megatron_dump.rollout import Generator
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.rollout.recorded import RecordedGenerator, RecordingGenerator
from megatron_dump.rollout.resharded import ReshardedGenerator
from megatron_dump.rollout.sampling import SamplingOptions


def make_generators(
    config: Config, actor: MegatronGPTGRPOActor, tokenizer: PreTrainedTokenizerFast, replica: Replica
) -> tuple[Generator, Generator, Engines | None]:
    """What training samples from, what validation does (always the policy), and the engines, where there are any."""
    model, backend, grid = config.model, config.trainer.grpo.inference_backend, actor.parallel
    sampling = model.grpo.sampling_params
    eos = actor.arch.hf.eos_token_id
    if eos is None:
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={config.pretrained_checkpoint.restore_from_path}: config.json "
            "has no eos_token_id, so no completion would end; add it"
        )
    stop_ids = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    options = SamplingOptions(
        model.grpo.length_params.max_length,
        stop_ids,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.use_greedy,
    )
    settings = (options, model.seed, model.grpo.generation_rollout_mbs, tokenizer.decode)
    policy: Generator = MegatronGenerator(actor, *settings)
    if backend.reshard:
        whole = WholePolicy(actor, config.trainer.precision)
        policy = ReshardedGenerator(MegatronGenerator(whole, *settings), whole)
    generator, engines = policy, None
    if backend.type == "recorded":
        generator = RecordedGenerator(str(backend.path), tokenizer.decode)
    elif backend.type == "vllm":
        generator, engines = start_engines(config, actor, replica, options, tokenizer.decode)
    if backend.record:
        writes = grid.tensor_rank == 0 and grid.context_rank == 0 and grid.is_first_stage
        generator = RecordingGenerator(generator, backend.record, grid.data_rank if writes else None)
    return generator, policy, engines
