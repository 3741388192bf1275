"""Convert between Hugging Face folders and checkpoints of a run, at any layout.

    # the policy of a run, as a folder that transformers and vLLM load
    python tools/convert_checkpoint.py to-hf results/kk/checkpoints/step_150 models/kk-150 --source models/Qwen2.5-7B

    # a Hugging Face folder as a checkpoint (weights only), for any tool that reads megatron-core's format
    torchrun --nproc-per-node=4 tools/convert_checkpoint.py to-megatron models/Qwen2.5-7B models/qwen-mcore \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

    # are two Hugging Face folders the same, byte by byte, however their tensors are spread over files?
    python tools/convert_checkpoint.py check models/kk-150 models/Qwen2.5-7B

A rank holds its part of the model, one group of tensors and one file being written: for a model larger than the
machine's memory, start more ranks. The layout of the conversion need not be that of the run. No optimizer is needed;
none is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from kk.progress import meter
from megatron_dump.actor import convert, model, parallel, weights_checkpoint
from megatron_dump.actor.architecture import read_architecture
from megatron_dump.actor.hf_compare import differences
from megatron_dump.actor.hf_files import HFTensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUT = {  # option -> field of parallel.Layout
    "tensor-model-parallel-size": "tensor",
    "pipeline-model-parallel-size": "pipeline",
    "expert-model-parallel-size": "expert",
    "expert-tensor-parallel-size": "expert_tensor",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="a run's checkpoint -> Hugging Face folder")
    to_hf.add_argument("checkpoint", help="a run's step_<n> folder, or what to-megatron wrote")
    to_hf.add_argument("out", help="the new folder")
    to_hf.add_argument("--source", required=True, help="folder the run started from: config, tokenizer, dtypes")
    to_hf.add_argument("--dtype", choices=DTYPES, help="of every tensor; without it, each has its dtype in --source")
    to_hf.add_argument("--max-shard-size", default="5GB", help="of one file (default: %(default)s)")
    to_megatron = commands.add_parser("to-megatron", help="Hugging Face folder -> checkpoint without an optimizer")
    to_megatron.add_argument("source", help="a Hugging Face model folder")
    to_megatron.add_argument("out", help="the new folder")
    to_megatron.add_argument("--precision", choices=("32", "bf16"), help="of the weights (default: the folder's)")
    for command in (to_hf, to_megatron):
        command.add_argument("--replace", action="store_true", help="exchange a folder that exists")
        for option, field in LAYOUT.items():
            command.add_argument(f"--{option}", dest=field, type=int, default=1, metavar="N")
        command.add_argument("--virtual-pipeline-model-parallel-size", dest="virtual_pipeline", type=int, metavar="N")
    check = commands.add_parser("check", help="compare two Hugging Face folders byte by byte")
    check.add_argument("a")
    check.add_argument("b")
    return parser.parse_args(argv)


def build(args: argparse.Namespace, precision: str):
    """The model's chunks on this rank, weights not yet loaded; its architecture; the grid."""
    sizes = {field: getattr(args, field) for field in LAYOUT.values()}
    # Sequence parallelism changes no weight; megatron-core wants it for experts beside tensor parallelism.
    layout = parallel.Layout(**sizes, virtual_pipeline=args.virtual_pipeline, sequence=args.tensor > 1)
    grid = parallel.initialize(layout)
    # Checkpoints of any padding can be loaded: the vocabulary is cut to its own length on the way out.
    arch = read_architecture(args.source, divisible_by=1, tensor_size=args.tensor)
    config = model.transformer_config(arch, grid, precision)
    chunks = range(layout.virtual_pipeline or 1)
    return [model.build_model(arch, config, grid, chunk=i) for i in chunks], arch, grid


def to_hf(args: argparse.Namespace) -> None:
    precision = {torch.bfloat16: "bf16"}.get(weights_checkpoint.stored_dtype(args.checkpoint), "32")
    modules, arch, grid = build(args, precision)
    with meter("read", show=grid.rank == 0):
        weights_checkpoint.load_weights(modules, arch, grid, args.checkpoint)
    with meter("write", show=grid.rank == 0) as on_progress:
        convert.save_hf(
            modules,
            arch,
            grid,
            args.out,
            source=args.source,
            dtype=DTYPES.get(args.dtype),
            max_shard_size=args.max_shard_size,
            replace=args.replace,
            on_progress=on_progress,
        )


def to_megatron(args: argparse.Namespace) -> None:
    dtypes = {entry.dtype for entry in HFTensors(args.source).entries.values()}
    modules, arch, grid = build(args, args.precision or ("bf16" if dtypes == {"BF16"} else "32"))
    with meter("read", show=grid.rank == 0) as on_progress:
        convert.load_hf(modules, arch, grid, args.source, on_progress)
    with meter("write", show=grid.rank == 0):
        weights_checkpoint.save_weights(modules, grid, args.out, args.replace)


def check(args: argparse.Namespace) -> None:
    with meter("compare") as on_progress:
        found = differences(args.a, args.b, on_progress)
    if found:
        raise ValueError("\n".join(found))
    print(f"{args.a} and {args.b} are equal")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        {"to-hf": to_hf, "to-megatron": to_megatron, "check": check}[args.command](args)
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
