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

import torch.distributed as dist
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from megatron_dump import config as schema
from megatron_dump.config import Config, ConfigError

CONF = pathlib.Path(__file__).resolve().parent / "conf"
OPEN_BLOCKS = (
    "trainer.grpo.curriculum", "model.data.rewards", "exp_manager.wandb_logger_kwargs",
    "trainer.grpo.inference_backend.vllm",
)  # fmt: skip


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


def read_config(argv: list[str]) -> tuple[DictConfig, Config]:
    """The composed YAML and its checked form. ConfigError in one line for anything wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default="gpt_grpo")
    parser.add_argument("--config-path", type=pathlib.Path, default=CONF, help="a folder of recipes of your own")
    parser.add_argument("overrides", nargs="*", help="key=value")
    args = parser.parse_intermixed_args(argv)
    search = [] if args.config_path.resolve() == CONF else [f"hydra.searchpath=[file://{CONF}]"]
    try:
        with initialize_config_dir(str(args.config_path.resolve()), version_base="1.3"):
            raw = compose(args.config_name, [*open_blocks(args.overrides), *search])
    except (HydraException, yaml.YAMLError) as error:
        key = next((o.split("=")[0] for o in args.overrides if o.split("=")[0].lstrip("+~") in str(error)), None)
        if key is not None:
            raise ConfigError(schema.unknown_key(key)) from None
        raise ConfigError(f"--config-name={args.config_name}: {' '.join(str(error).split())}") from None
    return raw, schema.load(raw)


def main() -> int:
    # What upstream says to itself on every rank: missing fused kernels, deprecated calls.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        raw, config = read_config(sys.argv[1:])
        from megatron_dump.assemble import build_trainer  # after the check: a wrong key need not wait for Megatron

        trainer = build_trainer(config)
        trainer.resume(config.exp_manager.resume_if_exists)
    except (ValueError, OSError) as error:  # what is wrong with the input; a traceback would bury it
        print(f"[rank {os.environ.get('RANK', '0')}] error: {error}", file=sys.stderr, flush=True)
        return 1
    log_dir = pathlib.Path(config.exp_manager.explicit_log_dir)
    if dist.get_rank() == 0:
        OmegaConf.save(raw, log_dir / "config.yaml", resolve=True)
    trainer.fit()
    trainer.close()
    if dist.get_rank() == 0:
        from megatron_dump.report import write_report

        html, png = write_report(log_dir)
        print(f"report: {html}\n        {png}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
