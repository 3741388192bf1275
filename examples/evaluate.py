"""Evaluate a policy per source: accuracy, pass@k, maj@k, reward, length, greedily and sampled, with intervals.

    torchrun --nproc-per-node=2 examples/evaluate.py --config-name=kk_cpu evaluate.checkpoint=… [key=value …]

The recipe says model, layout, rewards and sampling; the block `evaluate` (conf/evaluate/default.yaml) the rest.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import sys
import warnings
from typing import Any

from train_gpt_grpo import compose_config, rank, refuse

from kk.progress import meter
from megatron_dump.config import Config
from megatron_dump.config.evaluate_schema import EvaluateConfig, load_evaluation


def read_config(argv: list[str]) -> tuple[Config, EvaluateConfig]:
    """The recipe and the block `evaluate`, checked. ConfigError in one line for anything wrong with them."""
    argv = [f"++{argument}" if argument.startswith("evaluate.") else argument for argument in argv]  # checked below
    return load_evaluation(compose_config(argv, str(__doc__), ["+evaluate=default"]))


def write(result: dict[str, Any], path: pathlib.Path) -> None:
    """As JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> int:
    # What upstream says to itself on every rank: missing fused kernels, deprecated calls.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        config, wanted = read_config(sys.argv[1:])
    except (ValueError, OSError) as error:
        return refuse(error, None)
    # After the check: a wrong key need not wait for torch. What `record` writes of an exception, torchrun reads.
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(run)(config, wanted)


def run(config: Config, wanted: EvaluateConfig) -> int:
    """From the meeting of the ranks to the table."""
    import torch.distributed as dist

    def tell(line: str) -> None:
        if line and rank() == 0:
            print(line, file=sys.stderr, flush=True)

    try:
        from megatron_dump.evaluation import evaluate_policy
        from megatron_dump.evaluation_table import show

        with meter("completions", show=rank() == 0) as on_progress:
            result = evaluate_policy(config, wanted, tell, on_progress)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error, None)
    if rank() == 0:
        out = pathlib.Path(wanted.out or pathlib.Path(config.exp_manager.explicit_log_dir) / "evaluation.json")
        write(result, out)
        show(result)
        print(f"evaluation: {out}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
