"""Train a policy by GRPO with an adaptive curriculum.

    torchrun --nproc-per-node=8 examples/train_gpt_grpo.py --config-name=kk_cpu [key=value …]

Configurations are in examples/conf; gpt_grpo.yaml documents every key.
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import sys
import warnings

import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from megatron_dump import config as schema
from megatron_dump.config import Config, ConfigError

CONF = pathlib.Path(__file__).resolve().parent / "conf"


def read_config(argv: list[str]) -> tuple[DictConfig, Config]:
    """The composed YAML and its checked form. ConfigError in one line for anything wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default="gpt_grpo")
    parser.add_argument("--config-path", type=pathlib.Path, default=CONF)
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        with initialize_config_dir(str(args.config_path.resolve()), version_base="1.3"):
            raw = compose(args.config_name, args.overrides)
    except HydraException as error:
        key = next((o.split("=")[0] for o in args.overrides if o.split("=")[0].lstrip("+~") in str(error)), None)
        if key is not None:
            raise ConfigError(schema.unknown_key(key)) from None
        raise ConfigError(f"--config-name={args.config_name}: {' '.join(str(error).split())}") from None
    return raw, schema.load(raw)


def load_tokenizer(path: str):
    """The tokenizer as its tokenizer.json says; AutoTokenizer may rebuild another one from the model type."""
    from transformers import PreTrainedTokenizerFast

    if not (pathlib.Path(path) / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"pretrained_checkpoint.restore_from_path={path}: no tokenizer.json there; give a Hugging Face model folder"
        )
    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)


def build(raw: DictConfig, config: Config):
    """All parts of a run, from configuration to trainer. Imports here: a wrong key must not wait for Megatron."""
    from megatron_dump.actor import parallel
    from megatron_dump.actor.actor import MegatronGPTGRPOActor
    from megatron_dump.actor.checkpoint import Checkpoints
    from megatron_dump.curriculum.curriculum import Curriculum
    from megatron_dump.curriculum.sampler import MegatronCurriculumBatchSampler
    from megatron_dump.data import PromptDataset
    from megatron_dump.distributed import DrawBroadcast, Replica
    from megatron_dump.monitor import Monitor
    from megatron_dump.rollout.megatron import MegatronGenerator
    from megatron_dump.rollout.recorded import RecordedGenerator, RecordingGenerator
    from megatron_dump.rollout.sampling import SamplingOptions
    from megatron_dump.scoring import Scorer
    from megatron_dump.trainer import GRPOTrainer

    grpo, model, data = config.trainer.grpo, config.model, config.model.data
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    schema.check_data_parallel(
        config,
        parallel.check_layout(world_size, model.tensor_model_parallel_size, model.pipeline_model_parallel_size),
    )
    path = config.pretrained_checkpoint.restore_from_path
    tokenizer = load_tokenizer(path)

    def encode(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def dataset(files: list[str], key: str) -> PromptDataset:
        return PromptDataset(
            files, grpo.curriculum.source_key, encode=encode, max_prompt_length=data.max_prompt_length, key=key
        )

    train = dataset(data.train_files, "model.data.train_files")
    validation = dataset(data.validation_files, "model.data.validation_files") if data.validation_files else None
    sources = sorted({*train.sources, *(validation.sources if validation else ())})
    scorer = Scorer(data.rewards, sources)
    curriculum = Curriculum(
        train.source_of_rows, grpo.num_prompts_per_grpo_step, grpo.samples_per_prompt, model.seed,
        {"sources": grpo.curriculum.sources, "prompts": grpo.curriculum.prompts, "budget": grpo.curriculum.budget},
        train.fingerprint,
    )  # fmt: skip

    grid = parallel.initialize(
        model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.seed,
        timeout_s=config.trainer.collective_timeout_s,
    )  # fmt: skip
    actor = MegatronGPTGRPOActor(config, grid)
    sampling = model.grpo.sampling_params
    eos = actor.arch.hf.eos_token_id
    stop_ids = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    validator = generator = MegatronGenerator(
        actor,
        SamplingOptions(
            model.grpo.length_params.max_length, stop_ids,
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.use_greedy,
        ),
        model.seed,
        model.grpo.generation_rollout_mbs,
        tokenizer.decode,
    )  # fmt: skip
    backend = grpo.inference_backend
    if backend.type == "recorded":
        generator = RecordedGenerator(str(backend.path), tokenizer.decode, stop_ids)
    if backend.record:
        writes = grid.tensor_rank == 0 and grid.is_first_stage
        generator = RecordingGenerator(generator, backend.record, grid.data_rank if writes else None)
    groups_per_update = model.global_batch_size // grpo.samples_per_prompt
    log_dir = pathlib.Path(config.exp_manager.explicit_log_dir)
    trainer = GRPOTrainer(
        config=grpo,
        groups_per_update=groups_per_update,
        max_length=model.grpo.length_params.max_length,
        use_reference=grpo.initial_policy_kl_penalty > 0,
        owns_curriculum=grid.rank == 0,
        actor=actor,
        generator=generator,
        validator=validator,
        dataset=train,
        validation=validation,
        scorer=scorer,
        curriculum=curriculum,
        sampler=MegatronCurriculumBatchSampler(
            len(train), 0, groups_per_update // grid.data_size, grpo.num_prompts_per_grpo_step,
            grid.data_rank, grid.data_size, seed=model.seed, curriculum=curriculum,
            broadcast=DrawBroadcast(
                device=grid.device, n_prompts=grpo.num_prompts_per_grpo_step, n_sources=len(curriculum.sources)
            ),
            block_size=groups_per_update,
        ),
        replica=Replica(grid.data_rank, grid.data_size, grid.data_group, grid.device),
        checkpoints=Checkpoints(log_dir / "checkpoints", actor),
        monitor=Monitor(log_dir, curriculum.sources, grpo.max_steps, grid.rank, vars(config.exp_manager)),
    )  # fmt: skip
    if grid.rank == 0:
        OmegaConf.save(raw, log_dir / "config.yaml")
    return trainer


def main() -> int:
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        raw, config = read_config(sys.argv[1:])
        trainer = build(raw, config)
        trainer.resume(config.exp_manager.resume_if_exists)
    except (ValueError, FileNotFoundError) as error:  # what is wrong with the input; a traceback would bury it
        print(f"[rank {os.environ.get('RANK', '0')}] error: {error}", file=sys.stderr, flush=True)
        return 1
    trainer.fit()
    trainer.monitor.close()
    if dist.get_rank() == 0:
        from megatron_dump.report import write_report

        html, png = write_report(config.exp_manager.explicit_log_dir)
        print(f"report: {html}\n        {png}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
