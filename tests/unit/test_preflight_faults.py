"""tools/slurm/preflight.py: what is wrong with which node, from what the nodes report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "slurm"))

from node_checks import compare, names
from node_checks.facts import Facts, Findings


def sound(host: str, **changes) -> Facts:
    """A node with eight GPUs on which all is well."""
    room = {"memory": 2**40, "memory_needed": 2**33, "shared_memory": 2**30, "disk": 2**40, "checkpoint": 2**30}
    defaults = {"gpus": ["H100"] * 8, "gpu_used": [0] * 8, "versions": {"torch": "2.6"}, "log_dir": "log", **room}
    return Facts(host, **{**defaults, **changes})


@pytest.mark.parametrize(
    ("changes", "at_fault", "said"),
    [
        ({}, [], None),
        ({"gpus": ["H100"] * 7}, [1], "b: 7 GPUs, wanted 8"),
        ({"gpus": []}, [1], "b: 0 GPUs, wanted 8"),
        ({"memory": 2**30}, [1], "b: 1.0 GiB of host memory available, wanted at least 8.0 GiB"),
        ({"versions": {"torch": "2.7"}}, [], "torch: 2.6 on a; 2.7 on b; wanted one on all nodes: make them the same"),
        ({"failed": "checking the GPUs: TimeoutError: no answer in 60 s"}, [1], "b: checking the GPUs"),
        ({"refused": "no such file: x"}, [], "b: no such file: x (the other nodes find nothing wrong"),
        ({"unwritable": {"log": "Read-only file system"}}, [], "b: cannot write to log (Read-only file system)"),
    ],
)
def test_what_is_laid_to_one_of_two_nodes(changes, at_fault, said):
    found = compare.problems({0: sound("a"), 1: sound("b", **changes)}, {}, 8, 60)
    assert [p.at_fault for p in found] == [at_fault] * bool(said)
    assert not any(p.is_refusal for p in found)
    assert said is None or found[0].text.startswith(said)


def test_what_all_nodes_lack_is_nobodys_fault():
    changes = {"gpus": ["H100"] * 4, "memory": 0, "disk": 2**31 - 1}
    found = compare.problems({n: sound(f"n{n}", **changes) for n in range(3)}, {}, 8, 60)
    assert len(found) == 3 + 3 + 1
    assert not any(p.at_fault or p.is_warning for p in found)
    assert found[-1].text.startswith("n0: 2.0 GiB free in log, wanted 2.0 GiB for 2 checkpoints")


def test_warnings():
    facts = {0: sound("a", gpu_used=[0] * 7 + [3 * 2**30]), 1: sound("b", shared_memory=2**20)}
    found = compare.problems(facts, {}, 8, 60)
    found += compare.found_of_others(facts, {0: Findings(), 1: Findings(clock_s=-61)})
    assert [p.is_warning for p in found] == [True] * 3
    assert [p.text.split(",")[0] for p in found] == [
        "a: GPU 7 has 3.0 GiB in use",
        "b: 1 MiB free in /dev/shm",
        "b: its clock is -61 s off a's",
    ]


@pytest.mark.parametrize(
    ("values", "odd"),
    [("aaa", ""), ("aba", "1"), ("ab", ""), ("aabb", ""), ("aabc", ""), ("aaabc", "34"), ("a", "")],
)
def test_minority(values, odd):
    assert compare.minority(dict(enumerate(values))) == [int(node) for node in odd]


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("gpu7", "gpu7"),
        ("gpu[1-3,7]", "gpu1 gpu2 gpu3 gpu7"),
        ("login,gpu[08-11]", "login gpu08 gpu09 gpu10 gpu11"),
        ("r[1-2]n[01,3],x", "r1n01 r1n3 r2n01 r2n3 x"),
        ("", ""),
    ],
)
def test_hostlists(text, expanded):
    assert names.expand(text) == expanded.split()
