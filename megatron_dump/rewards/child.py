"""What a reward process runs. It imports the reward functions and what they import, so no torch unless they do.

The parent writes pickles: first the setup (a dict), then lists of (source, text, ground truth). The answers are lines
of JSON, one a job in the order given: text that a model wrote may have had its way with this process, so the parent
unpickles nothing of it. A first line, ["ready"] or ["failed", why], follows the setup.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import pickle
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dump.rewards.registry import GroundTruthError, RewardFn, register_reward, reward_functions
from megatron_dump.types import Score

SCORE, CRASH, TIMEOUT, BAD_TRUTH = "score", "crash", "timeout", "bad truth"
VERDICTS = (SCORE, CRASH, TIMEOUT, BAD_TRUTH)
READY, FAILED = "ready", "failed"
OUT_OF_MEMORY = 86  # exit code
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST_REASON, _LONGEST_ANSWER = 500, 5000  # characters


def judge(function: RewardFn, text: str, ground_truth: str) -> tuple[Any, ...]:
    """(SCORE, a Score's fields …), or (what went wrong, its words). MemoryError alone is raised."""
    try:
        score = function(text, ground_truth)
        if not isinstance(score, Score):
            raise TypeError(f"it returned {score!r}, not a Score")
        components = {str(name): float(value) for name, value in score.components.items()}
        reason = str(score.reason)[:_LONGEST_REASON]
        answer = None if score.answer is None else str(score.answer)[:_LONGEST_ANSWER]
        return SCORE, float(score.reward), bool(score.correct), bool(score.well_formed), reason, components, answer
    except MemoryError:
        raise
    except GroundTruthError as error:
        return BAD_TRUTH, str(error)
    except TimeoutError as error:
        return TIMEOUT, str(error)[:_LONGEST_REASON]
    except (Exception, SystemExit) as error:  # noqa: BLE001  a fault of a user's function is counted, whatever it is
        return CRASH, f"{type(error).__name__}: {error}"[:_LONGEST_REASON]


def main() -> None:
    """Serve until the parent closes the pipe, or is gone."""
    _die_with_parent(int(sys.argv[1]))
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a reward function prints is no answer
    try:
        setup = pickle.load(jobs)
        functions = _prepare(setup)
    except Exception as error:  # noqa: BLE001  the parent tells the user, whatever it is
        words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        _say(answers, [FAILED, words])
        return
    _say(answers, [READY])
    while True:
        try:
            chunk = pickle.load(jobs)
        except EOFError:
            return
        for source, text, ground_truth in chunk:
            try:
                answer = judge(functions[source], text, ground_truth)
            except MemoryError:  # memory stays short while caches hold it: a fresh process is the cure
                os._exit(OUT_OF_MEMORY)
            _say(answers, answer)


def _prepare(setup: Mapping[str, Any]) -> dict[str, RewardFn]:
    for name, path in setup["registered"].items():
        register_reward(name, path)
    functions = reward_functions(setup["mapping"], setup["sources"])
    if setup["memory_gb"] is not None:
        limit = math.ceil(setup["memory_gb"] * 2**30)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is counted, not dumped
    return functions


def _say(answers: Any, answer: Any) -> None:
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:  # a raw pipe may take less than it is given
        data = data[answers.write(data) :]


def _die_with_parent(parent: int) -> None:
    """No orphans, even of a parent that was killed while this process computes; and first in line when memory is short.

    The signal needs Linux; elsewhere the process ends when it next reads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
