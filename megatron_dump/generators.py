"""Where a run's completions come from, by `trainer.grpo.inference_backend`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.policy import Policy
from megatron_dump.config import Config, ConfigError
from megatron_dump.distributed import Replica
from megatron_dump.engines import start_engines
from megatron_dump.protocols import Engines
from megatron_dump.ray_cluster import Cluster
from megatron_dump.rollout import AsyncGenerator
from megatron_dump.rollout.eager import Eager, NoEngines
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.rollout.recorded import RecordedGenerator, RecordingGenerator
from megatron_dump.rollout.reshard import choose, policy_generator
from megatron_dump.rollout.resharded import ReshardedGenerator
from megatron_dump.rollout.sampling import SamplingOptions


@dataclasses.dataclass(frozen=True)
class Generators:
    """What training samples from, what validation does, and what runs outside the training processes."""

    training: AsyncGenerator
    validation: AsyncGenerator  # the training weights, whatever trains
    engines: Engines
    notice: str  # for people: which split of the policy generates


def make_generators(
    config: Config,
    actor: MegatronGPTGRPOActor,
    tokenizer: PreTrainedTokenizerFast,
    replica: Replica,
    cluster: Cluster | None,
) -> Generators:
    """A collective of all ranks. ConfigError on every rank, when engines cannot be started.

    cluster: rank 0's connection to Ray, where engines run there.
    """
    backend, grid = config.trainer.grpo.inference_backend, actor.parallel
    options = sampling_options(config, actor, tokenizer)
    on_weights = weights_generator(config, actor, tokenizer, options)
    validation = Eager(on_weights.greedy() if config.trainer.grpo.greedy_on_validation else on_weights)
    training: AsyncGenerator = Eager(on_weights)
    engines: Engines = NoEngines()
    if backend.type == "recorded":
        training = Eager(RecordedGenerator(str(backend.path), tokenizer.decode))
    elif backend.type == "vllm":
        training, engines = start_engines(config, actor, replica, options, tokenizer.decode, cluster)
    if backend.record:
        writes = grid.tensor_rank == 0 and grid.context_rank == 0 and grid.is_first_stage
        training = RecordingGenerator(training, backend.record, grid.data_rank if writes else None)
    return Generators(training, validation, engines, on_weights.notice)


def weights_generator(
    config: Config,
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    options: SamplingOptions,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MegatronGenerator | ReshardedGenerator:
    """One on the policy's own weights, split as `inference_backend.reshard` says. A collective of all ranks.

    on_progress: MegatronGenerator's.
    """
    model = config.model
    settings = (options, model.seed, model.grpo.generation_rollout_mbs, tokenizer.decode, on_progress)
    choice = choose(policy, config.trainer.grpo.inference_backend.reshard)
    return policy_generator(
        policy, choice, config.trainer.precision, lambda weights: MegatronGenerator(weights, *settings)
    )


def sampling_options(config: Config, actor: Policy, tokenizer: PreTrainedTokenizerFast) -> SamplingOptions:
    """Of `model.grpo`. ConfigError for a model that names no stop token, and for end strings that are no tokens."""
    model, eos = config.model, actor.arch.hf.eos_token_id
    if eos is None:
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={config.pretrained_checkpoint.restore_from_path}: config.json "
            "has no eos_token_id, so no completion would end; add it"
        )
    sampling, lengths = model.grpo.sampling_params, model.grpo.length_params
    ends = [_end_token(text, tokenizer) for text in sampling.end_strings]
    return SamplingOptions(
        lengths.max_length,
        tuple(dict.fromkeys([*(eos if isinstance(eos, (list, tuple)) else [eos]), *ends])),
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.use_greedy,
        lengths.min_length,
    )


def _end_token(text: str, tokenizer: PreTrainedTokenizerFast) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or tokenizer.decode(ids) != text:
        raise ConfigError(
            f"model.grpo.sampling_params.end_strings={text!r}: it is no single token of the tokenizer; remove it"
        )
    return ids[0]
