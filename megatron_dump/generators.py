"""Where a run's completions come from, by `trainer.grpo.inference_backend`."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.config import Config, ConfigError
from megatron_dump.rollout import AsyncGenerator
from megatron_dump.rollout.eager import Eager
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.rollout.recorded import RecordedGenerator, RecordingGenerator
from megatron_dump.rollout.reshard import choose, policy_generator
from megatron_dump.rollout.sampling import SamplingOptions


def make_generators(
    config: Config, actor: MegatronGPTGRPOActor, tokenizer: PreTrainedTokenizerFast
) -> tuple[AsyncGenerator, AsyncGenerator]:
    """What training samples from, and what validation does: the latter is always the policy."""
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
        model.grpo.length_params.min_length,
    )
    settings = (options, model.seed, model.grpo.generation_rollout_mbs, tokenizer.decode)
    choice = choose(actor, backend.reshard)
    precision = config.trainer.precision
    policy = Eager(policy_generator(actor, choice, precision, lambda weights: MegatronGenerator(weights, *settings)))
    generator: AsyncGenerator = policy
    if backend.type == "recorded":
        generator = Eager(RecordedGenerator(str(backend.path), tokenizer.decode))
    if backend.record:
        writes = grid.tensor_rank == 0 and grid.context_rank == 0 and grid.is_first_stage
        generator = RecordingGenerator(generator, backend.record, grid.data_rank if writes else None)
    return generator, policy
