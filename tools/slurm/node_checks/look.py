"""What a node finds out: about itself (`look`), and about the others (`try_others`)."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import time
from typing import Any

import torch.distributed as dist
from network import choose_interface

from node_checks import arguments, folders, machine, reduce
from node_checks.board import Board
from node_checks.facts import Facts, Findings
from node_checks.limits import within
from node_checks.names import own_name

FOLDER_LIMIT_S = 30.0  # until every node sees what the others wrote


def look(args: argparse.Namespace) -> Facts:
    """The arguments first: if they cannot run, the rest does not matter."""
    inspection = _Inspection(args)
    try:
        within(args.timeout_s, inspection.run)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with this node belongs into the head node's report
        inspection.facts.failed = f"checking {inspection.subject}: {type(error).__name__}: {one_line(error)}"
    return dataclasses.replace(inspection.facts)  # a check that still hangs writes into the other one


class _Inspection:
    """Fills `facts` in; `subject` is what is being looked at."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.facts = Facts(own_name())
        self.subject = "the arguments"

    def run(self) -> None:
        facts, args = self.facts, self._args
        try:
            plan = arguments.check(args.training, args.training_nodes * args.nproc)
        except (ValueError, OSError) as error:  # what the trainer takes for wrong input
            facts.refused = one_line(error)
            return
        facts.log_dir, facts.resume_step, facts.checkpoint = str(plan.log_dir), plan.resume_step, plan.checkpoint
        self.subject = "versions"
        facts.versions = machine.versions(arguments.SCRIPT)
        self.subject = "the GPUs"
        facts.gpus, facts.gpu_used = machine.gpus()
        self.subject = "memory"
        facts.memory, facts.shared_memory = machine.memory_available(), machine.free("/dev/shm")
        facts.memory_needed = args.nproc * (plan.host_memory_beside_gpu if facts.gpus else plan.host_memory)
        for folder in (args.folder, plan.log_dir):
            self.subject = str(folder)
            try:
                facts.tokens[str(folder)] = folders.write_token(folder, args.node_rank)
            except OSError as error:
                facts.unwritable[str(folder)] = error.strerror or type(error).__name__
        if facts.log_dir in facts.tokens:
            facts.disk = machine.free(plan.log_dir)


def try_others(args: argparse.Namespace, board: Board, plan: dict[str, Any]) -> Findings:
    """plan: tokens {folder: {node: content}}, device, reduce (whether to), time (of the head node's clock, now)."""
    found = Findings(clock_s=time.time() - plan["time"])
    problems = []
    limit = min(FOLDER_LIMIT_S, args.timeout_s)
    for folder, by_node in plan["tokens"].items():
        tokens = {int(node): content for node, content in by_node.items()}
        path = pathlib.Path(folder)
        try:
            away = within(limit + 1, lambda path=path, tokens=tokens: folders.unseen(path, tokens, limit))
        except OSError as error:
            away = sorted(tokens)
            problems.append(
                f"{folder} cannot be read ({error.strerror or error}), wanted a folder that all nodes share"
            )
        if away:
            found.unseen[folder] = away
    if plan["reduce"]:
        choose_interface(args.head.rpartition(":")[0])
        try:
            found.gb_per_s, found.latency_us = within(args.timeout_s + 1, lambda: _reduce(args, board, plan["device"]))
        except Exception as error:  # noqa: BLE001 - gloo and NCCL raise many kinds; the head node's report names it
            problems.append(
                f"no all-reduce between the nodes: {type(error).__name__}: {one_line(error)}; open all ports between "
                "the nodes, or name the interface: "
                f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', '')}, "
                f"NCCL_SOCKET_IFNAME={os.environ.get('NCCL_SOCKET_IFNAME', '')}"
            )
    found.failed = "; ".join(problems) or None
    return found


def _reduce(args: argparse.Namespace, board: Board, device: str) -> tuple[float, float]:
    store = dist.PrefixStore("reduce", board.connect())
    return reduce.measure(store, args.node_rank, args.nodes, device, args.timeout_s)


def remove_tokens(facts: Facts, node: int) -> None:
    for folder in facts.tokens:
        folders.remove_token(pathlib.Path(folder), node)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
