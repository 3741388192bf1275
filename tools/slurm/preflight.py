"""Pre-flight of a run over several nodes: is everything there that it needs? One process a node, all at once.

    srun python tools/slurm/preflight.py --folder ATTEMPT/preflight --nodes N --nproc P --head IP:PORT \
        -- <arguments of examples/train_gpt_grpo.py>

Arguments, versions, GPUs, shared folders, disk, memory, clocks and an all-reduce between the nodes; exit 0 on all nodes
if all is well, else 1 on all. Node 0 prints the report and leaves in the folder: report.json (all figures), resume_step
(-1: nothing to resume from), bad_nodes (names of nodes that are at fault themselves) and refused (only if the arguments
cannot run). No wait is without end: about twice --timeout-s in all, when nodes do not answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING

from node_checks import compare, names, report
from node_checks.facts import Facts, Findings
from node_checks.limits import within

if TYPE_CHECKING:  # torch takes seconds: after the check of the options
    from node_checks.board import Board

GRACE_S = 15.0  # nodes wait so much longer for the head node than it waits for them


def parse(argv: list[str]) -> argparse.Namespace:
    """Our options, and as `training` what follows `--`."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="on a disk that all nodes share")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--training-nodes", type=int, help="the others only generate; default: all")
    parser.add_argument("--nproc", type=int, required=True, help="ranks on each node")
    parser.add_argument("--node-rank", type=int, default=os.environ.get("SLURM_PROCID"), help="default: SLURM_PROCID")
    parser.add_argument("--head", required=True, help="IP:PORT of node 0")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for reports of nodes, and for the all-reduce")
    args = parser.parse_args(argv[:split])
    if args.node_rank is None or not 0 <= args.node_rank < args.nodes:
        parser.error(f"--node-rank={args.node_rank}: wanted 0 … {args.nodes - 1} (--nodes={args.nodes})")
    if not args.head.rpartition(":")[2].isdigit():
        parser.error(f"--head={args.head}: wanted IP:PORT")
    args.training_nodes = args.training_nodes or args.nodes
    args.training = argv[split + 1 :]
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    faulthandler.dump_traceback_later(4 * args.timeout_s + 4 * GRACE_S, exit=True)  # the last resort
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # every try to reach the head node would be a warning
    start = time.monotonic()
    from node_checks.board import Board

    try:
        board = within(args.timeout_s + GRACE_S, lambda: Board(args.head, args.node_rank, args.timeout_s))
        return lead(args, board, start) if args.node_rank == 0 else follow(args, board)
    except (RuntimeError, TimeoutError) as error:  # the store's
        what = f"cannot listen at --head={args.head}" if args.node_rank == 0 else f"lost the head node, {args.head}"
        print(f"pre-flight error: {names.own_name()}: {what}: {error}".splitlines()[0], file=sys.stderr)
        return 1


def lead(args: argparse.Namespace, board: Board, start: float) -> int:
    """Node 0: gathers what the nodes report, tells them what to try with each other, and judges."""
    from node_checks.look import look, remove_tokens, try_others

    nodes, own = range(args.nodes), look(args)
    board.post("facts", dataclasses.asdict(own))
    facts = {n: Facts(**word) for n, word in board.gather("facts", nodes, start + args.timeout_s).items()}
    known = {n: facts[n].host if n in facts else names.name_of(n, args.nodes) for n in nodes}
    absent = {n: known[n] or f"node {n} of 0 … {args.nodes - 1}" for n in nodes if n not in facts}
    problems = compare.problems(facts, absent, args.nproc, args.timeout_s)
    findings: dict[int, Findings] = {}
    plan = None
    if not any(p.is_refusal for p in problems):
        plan = {
            "tokens": compare.tokens_by_folder(facts),
            "device": "cuda" if all(f.gpus for f in facts.values()) else "cpu",
            "reduce": not absent and not any(f.failed or f.refused for f in facts.values()),
            "time": time.time(),
        }
    board.post("plan", plan)
    if plan:
        end = time.monotonic() + 2 * args.timeout_s + GRACE_S / 3
        board.post("findings", dataclasses.asdict(try_others(args, board, plan)))
        findings = {n: Findings(**word) for n, word in board.gather("findings", facts, end).items()}
        problems += compare.found_of_others(facts, findings)
    report.show(facts, findings, problems)
    remove_tokens(own, args.node_rank)
    is_well = all(p.is_warning for p in problems)
    try:
        report.leave(args.folder, facts, findings, problems, known, time.monotonic() - start)
    except OSError as error:
        print(f"pre-flight error: {own.host}: cannot leave the results: {error}; change --folder", file=sys.stderr)
        is_well = False
    board.post("verdict", is_well)
    board.gather("read", set(facts) - {0}, time.monotonic() + GRACE_S / 3)  # then the store may go
    return 0 if is_well else 1


def follow(args: argparse.Namespace, board: Board) -> int:
    """Another node: reports, tries what the head node says, and takes its verdict."""
    from node_checks.look import look, remove_tokens, try_others

    own = look(args)
    board.post("facts", dataclasses.asdict(own))
    plan = board.word_of_head("plan", args.timeout_s + GRACE_S)
    if plan:
        board.post("findings", dataclasses.asdict(try_others(args, board, plan)))
    is_well = board.word_of_head("verdict", 2 * args.timeout_s + GRACE_S)
    remove_tokens(own, args.node_rank)
    board.post("read", True)
    if not is_well:
        print(f"pre-flight of {own.host}: failed, see the head node's report", file=sys.stderr)
    return 0 if is_well else 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what hangs, in a thread, keeps no node
