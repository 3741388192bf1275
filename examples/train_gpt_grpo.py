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
from collections.abc import Iterable, Iterator
from typing import NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from megatron_dump import config as schema
from megatron_dump.config import Config, ConfigError
from megatron_dump.stopping import STOP, Outcome, StopSignal

CONF = pathlib.Path(__file__).resolve().parent / "conf"
OPEN_BLOCKS = (
    "trainer.grpo.curriculum",
    "model.data.rewards",
    "exp_manager.wandb_logger_kwargs",
    "trainer.grpo.inference_backend.vllm",
)
# Errors of the input. Others of the system, such as a full disk, may pass.
LASTING = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def open_blocks(overrides: Iterable[str]) -> Iterator[str]:
    """Known keys, and those of blocks that depend on what they name, need no `+` where the YAML has none of them.

    `block={…}` replaces a curriculum's block as a whole.
    """
    known = schema.known_keys()
    for override in overrides:
        key, _, value = override.partition("=")
        if not key.startswith(tuple(f"{block}." for block in OPEN_BLOCKS)) and key not in OPEN_BLOCKS:
            yield f"++{override}" if key in known else override
            continue
        is_block = key in OPEN_BLOCKS or key.rpartition(".")[0] == OPEN_BLOCKS[0]
        if is_block and value.lstrip().startswith("{"):
            yield f"~{key}"
        yield f"++{override}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; the arguments are --config-name, --config-path and key=value")


def read_config(argv: list[str]) -> tuple[DictConfig, Config]:
    """The composed YAML and its checked form. ConfigError in one line for anything wrong with it."""
    raw = compose_config(argv, str(__doc__))
    return raw, schema.load(raw)


def compose_config(argv: list[str], about: str, blocks: Iterable[str] = ()) -> DictConfig:
    """The recipe that the arguments name, with their overrides. ConfigError in one line where it cannot be composed.

    blocks: further overrides that come first, as `+group=name`.
    """
    parser = _Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default="gpt_grpo")
    parser.add_argument("--config-path", type=pathlib.Path, default=CONF, help="a folder of recipes of your own")
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_intermixed_args(argv)
    search = [] if args.config_path.resolve() == CONF else [f"hydra.searchpath=[file://{CONF}]"]
    try:
        with initialize_config_dir(str(args.config_path.resolve()), version_base="1.3"):
            return compose(args.config_name, [*blocks, *open_blocks(args.overrides), *search])
    except (HydraException, yaml.YAMLError) as error:
        key = next((o.split("=")[0] for o in args.overrides if o.split("=")[0].lstrip("+~") in str(error)), None)
        if key is not None:
            raise ConfigError(schema.unknown_key(key)) from None
        raise ConfigError(f"--config-name={args.config_name}: {' '.join(str(error).split())}") from None


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def outcome_argument(argv: list[str]) -> str | None:
    """`exp_manager.outcome_file` if it is an argument: known even where the configuration cannot be read."""
    pairs = (argument.partition("=") for argument in argv)
    found = [value.strip("'\"") for key, _, value in pairs if key.lstrip("+") == "exp_manager.outcome_file"]
    return found[-1] if found and found[-1] not in ("", "null") else None


def refuse(error: Exception, outcome_file: str | None) -> int:
    """Say in a line what is wrong with the input; a traceback would bury it."""
    print(f"[rank {rank()}] error: {error}", file=sys.stderr, flush=True)
    if outcome_file is not None and rank() == 0 and isinstance(error, LASTING):
        Outcome("refused", 0, 0, " ".join(str(error).split())).write(outcome_file)
    return 1


def main() -> int:
    stop_signal = StopSignal()
    stop_signal.hold()  # first of all: until then the signal kills, or is lost
    # What upstream says to itself on every rank: missing fused kernels, deprecated calls.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    outcome_file = outcome_argument(sys.argv[1:])
    try:
        raw, config = read_config(sys.argv[1:])
        outcome_file = config.exp_manager.outcome_file
        if outcome_file is not None and rank() == 0:
            pathlib.Path(outcome_file).unlink(missing_ok=True)  # an earlier run's
    except (ValueError, OSError) as error:
        return refuse(error, outcome_file)
    # After the check: a wrong key need not wait for torch. What `record` writes of an exception, torchrun reads.
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(train)(raw, config, stop_signal)


def train(raw: DictConfig, config: Config, stop_signal: StopSignal) -> int:
    """From the meeting of the ranks to the report and the outcome."""
    manager, max_steps = config.exp_manager, config.trainer.grpo.max_steps
    log_dir = pathlib.Path(manager.explicit_log_dir)
    try:
        from megatron_dump.actor.checkpoint_files import steps
        from megatron_dump.assemble import build_trainer, join, make_stopping
        from megatron_dump.course import ends_at_start
        from megatron_dump.inputs import read_training_inputs

        stopping = make_stopping(config, rank(), stop_signal)
        inputs = None if (log_dir / STOP).exists() else read_training_inputs(config)
        grid = join(config)  # where they agree on whether the file is there: rank 0 alone counts
        ended = ends_at_start(stopping, grid.device, steps(log_dir / "checkpoints"), max_steps)
        if ended is not None:
            if rank() == 0:
                print(f"not started, {ended.step} of {max_steps} steps are done: {ended.reason}", flush=True)
            return leave(ended, manager.outcome_file)
        trainer = build_trainer(config, inputs, grid, stopping)
        trainer.resume(manager.resume_if_exists)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error, manager.outcome_file)
    if rank() == 0:
        OmegaConf.save(OmegaConf.create(schema.recorded(raw)), log_dir / "config.yaml")
    outcome = trainer.fit()
    trainer.close()
    if rank() == 0:
        from megatron_dump.report import write_report

        html, png = write_report(log_dir)
        print(f"report: {html}\n        {png}", flush=True)
    return leave(outcome, manager.outcome_file)


def leave(outcome: Outcome, outcome_file: str | None) -> int:
    """The end of every rank, once all are there."""
    import torch.distributed as dist

    dist.barrier()
    if rank() == 0 and outcome_file is not None:
        outcome.write(outcome_file)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
