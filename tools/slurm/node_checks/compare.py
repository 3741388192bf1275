"""What is wrong, and with which nodes, from what all of them report. Pure functions: no store, no files, no torch.

A node is at fault where it differs from more than half of the nodes, or where it alone, or one of several but not all,
lacks what a rank needs. What all nodes have in common is nobody's fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

from node_checks.facts import Facts, Findings, Problem

MAX_CLOCK_S = 5.0
MIN_SHARED_MEMORY = 64 * 2**20
CHECKPOINTS = 2  # the disk must take: a new one is written before an old one goes
MAX_GPU_USED = 2 * 2**30  # more than CUDA itself takes


def minority(values: Mapping[int, Hashable]) -> list[int]:
    """The nodes whose value is not that of more than half of them; [] when no value is."""
    (value, count), *_ = Counter(values.values()).most_common(1)
    return [node for node, other in values.items() if other != value] if count * 2 > len(values) else []


def tokens_by_folder(facts: Mapping[int, Facts]) -> dict[str, dict[int, str]]:
    """{folder: {node: what it wrote there}}"""
    folders = dict.fromkeys(folder for f in facts.values() for folder in f.tokens)
    return {folder: {n: f.tokens[folder] for n, f in facts.items() if folder in f.tokens} for folder in folders}


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def listing(nodes: list[int], facts: Mapping[int, Facts]) -> str:
    return ", ".join(facts[node].host for node in nodes)


def problems(facts: Mapping[int, Facts], absent: Mapping[int, str], nproc: int, waited_s: float) -> list[Problem]:
    """Of the nodes by themselves. absent: {node: what it is called} of those that never reported."""
    found = [
        Problem(
            f"{name}: nothing heard of it in {waited_s:.0f} s, wanted its report; see its log, and whether the node is "
            "up and reaches the head node's address",
            [node],
        )
        for node, name in absent.items()
    ]
    failed = [node for node, f in facts.items() if f.failed]
    found += [Problem(f"{facts[n].host}: {facts[n].failed}", [n] if len(failed) < len(facts) else []) for n in failed]
    found += _refusals(facts)
    sound = {node: f for node, f in facts.items() if not f.refused and not f.failed}
    return found + _versions(facts) + _gpus(sound, nproc) + _memory(sound) + _disk(sound) + _folders(sound)


def _refusals(facts: Mapping[int, Facts]) -> list[Problem]:
    """The same complaint of all nodes once; of some nodes, theirs if they are fewer than half."""
    refused = {node: f.refused for node, f in facts.items() if f.refused}
    at_fault = list(refused) if 2 * len(refused) < len(facts) else []
    return [
        Problem(
            f"{listing(nodes, facts)}: {text}"
            + ("" if len(refused) == len(facts) else " (the other nodes find nothing wrong: must it not be shared?)"),
            [node for node in nodes if node in at_fault],
            is_refusal=len(refused) == len(facts),
        )
        for text in dict.fromkeys(refused.values())
        if (nodes := [node for node, other in refused.items() if other == text])
    ]


def _versions(facts: Mapping[int, Facts]) -> list[Problem]:
    """CUDA's are compared between the nodes that have GPUs."""
    found = []
    for name in dict.fromkeys(name for f in facts.values() for name in f.versions):
        values = {node: f.versions[name] for node, f in facts.items() if name in f.versions}
        if len(set(values.values())) == 1:
            continue
        nodes_by_value = {v: [n for n, other in values.items() if other == v] for v in dict.fromkeys(values.values())}
        kinds = "; ".join(f"{value} on {listing(nodes, facts)}" for value, nodes in nodes_by_value.items())
        odd = minority(values)
        remedy = f"make {listing(odd, facts)} like the others" if odd else "make them the same"
        if name == "GPU":
            remedy = "ask for nodes of one kind (--constraint, --gpus-per-node=TYPE:N)"
        found.append(Problem(f"{name}: {kinds}; wanted one on all nodes: {remedy}", odd))
    return found


def _gpus(facts: Mapping[int, Facts], nproc: int) -> list[Problem]:
    found = []
    if any(f.gpus for f in facts.values()):
        short = [node for node, f in facts.items() if len(f.gpus) < nproc]
        at_fault = short if len(short) < len(facts) else []
        found += [
            Problem(
                f"{facts[n].host}: {len(facts[n].gpus)} GPUs, wanted {nproc}, one a rank; see nvidia-smi there, ask "
                "for --gpus-per-node, or lower trainer.devices",
                [n] if n in at_fault else [],
            )
            for n in short
        ]
    for f in facts.values():
        found += [
            Problem(
                f"{f.host}: GPU {i} has {gib(used)} in use, wanted none; end what runs there (nvidia-smi)",
                is_warning=True,
            )
            for i, used in enumerate(f.gpu_used)
            if used > MAX_GPU_USED
        ]
    return found


def _memory(facts: Mapping[int, Facts]) -> list[Problem]:
    short = [node for node, f in facts.items() if f.memory < f.memory_needed]
    found = [
        Problem(
            f"{f.host}: {gib(f.memory)} of host memory available, wanted at least {gib(f.memory_needed)} for its "
            "ranks; end what runs there, ask for --mem=0, or split the model more",
            [n] if len(short) < len(facts) else [],
        )
        for n, f in facts.items()
        if n in short
    ]
    found += [
        Problem(
            f"{f.host}: {f.shared_memory / 2**20:.0f} MiB free in /dev/shm, wanted {MIN_SHARED_MEMORY / 2**20:.0f}; "
            "remove what is left there, or give the container more (--shm-size)",
            is_warning=True,
        )
        for f in facts.values()
        if f.shared_memory < MIN_SHARED_MEMORY
    ]
    return found


def _disk(facts: Mapping[int, Facts]) -> list[Problem]:
    """One node speaks for all: the folder is shared."""
    f = next(iter(facts.values()), None)
    if f is None or f.log_dir in f.unwritable or f.disk >= CHECKPOINTS * f.checkpoint:
        return []
    return [
        Problem(
            f"{f.host}: {gib(f.disk)} free in {f.log_dir}, wanted {gib(CHECKPOINTS * f.checkpoint)} for {CHECKPOINTS} "
            "checkpoints; free some, or set exp_manager.explicit_log_dir to another disk"
        )
    ]


def _folders(facts: Mapping[int, Facts]) -> list[Problem]:
    found = []
    for folder in dict.fromkeys(folder for f in facts.values() for folder in f.unwritable):
        failed = {node: f.unwritable[folder] for node, f in facts.items() if folder in f.unwritable}
        is_log_dir = any(folder == f.log_dir for f in facts.values())
        for reason in dict.fromkeys(failed.values()):
            nodes = [node for node, other in failed.items() if other == reason]
            key = "exp_manager.explicit_log_dir" if is_log_dir else "--folder"
            found.append(
                Problem(
                    f"{listing(nodes, facts)}: cannot write to {folder} ({reason}), wanted a folder that all nodes "
                    f"share; change its permissions, or {key}",
                    nodes if 2 * len(failed) < len(facts) else [],
                    is_refusal=is_log_dir and len(failed) == len(facts),
                )
            )
    return found


def found_of_others(facts: Mapping[int, Facts], findings: Mapping[int, Findings]) -> list[Problem]:
    """What nodes found of each other; facts: of all that were asked, findings: of those that answered."""
    found = [
        Problem(f"{facts[n].host}: fell silent, wanted what it finds of the others; see its log", [n])
        for n in facts
        if n not in findings
    ]
    for folder in dict.fromkeys(folder for f in findings.values() for folder in f.unseen):
        missing = {node: f.unseen.get(folder, []) for node, f in findings.items()}
        views = {node: tuple(sorted(set(facts) - set(away))) for node, away in missing.items()}
        at_fault = minority(views)
        found += [
            Problem(
                f"{facts[node].host}: {folder} does not show what {listing(away, facts)} wrote there, wanted a folder "
                "that all nodes share; mount the same storage on all of them, or choose another folder",
                [node] if node in at_fault else [],
            )
            for node, away in missing.items()
            if away
        ]
    found += [
        Problem(
            f"{facts[n].host}: its clock is {f.clock_s:+.0f} s off {facts[0].host}'s, wanted less than "
            f"{MAX_CLOCK_S:.0f} s; synchronise it (chronyc, ntpdate)",
            is_warning=True,
        )
        for n, f in findings.items()
        if abs(f.clock_s) > MAX_CLOCK_S
    ]
    return found + [Problem(f"{facts[n].host}: {f.failed}") for n, f in findings.items() if f.failed]
