"""What judging costs: the kk reward against the length of a response, and a pool of processes against none."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from kk.text import NAMES
from kk_bench.tables import show
from megatron_dump.rewards.kk import KKReward
from megatron_dump.rewards.workers import Job, RewardPool

LENGTHS = tuple(2**k for k in range(10, 21, 2))  # bytes of UTF-8: 1 kB to 1 MB
GOAL_MS = 50.0  # of a response of 1 MB
SLOPE_FROM = 2**16  # below, the cost of the answer that is read outweighs the text's
SOLUTION = [(name, "knight" if i % 3 else "knave") for i, name in enumerate(NAMES[:14])]
WRITTEN = "\n".join(f"({i}) {name} is a {role}" for i, (name, role) in enumerate(SOLUTION, 1))
TRUTH = json.dumps({"solution_text_format": WRITTEN})
LONGEST_ANSWER = 1024 + 8 * len(WRITTEN)  # characters that the reward reads; more is refused at once
RIGHT = ", ".join(f"{name} is a {role}" for name, role in SOLUTION)
PROSE = "Suppose that this one is a knight, then what she says of her neighbour must be true. "
KINDS = {  # name -> what is repeated, and where it stands
    "prose, right answer": (PROSE, f"<think>{{}}</think><answer>{RIGHT}</answer>"),
    "unclosed answer tags": ("<answer>", "{}"),
    "unclosed tags in the answer": ("<answer", "<think>{}</think><answer>{short}</answer>"),
    "repeated names": (f"{NAMES[0]} is a knave, ", "<think>{}</think><answer>{short}</answer>"),
    "look-alike letters": ("Ζоеу іѕ а knаvе, ", "<think>{}</think><answer>{short}</answer>"),  # Greek and Cyrillic
    "newlines": ("\n", "<think>{}</think><answer>{short}</answer>"),
    "newlines between the tags": ("\n", f"<think></think>{{}}<answer>{RIGHT}</answer>"),
}


def response(kind: str, length: int) -> str:
    """A response of about so many bytes, half of them in the answer tags as long as the reward reads that much."""
    piece, frame = KINDS[kind]
    size = len(piece.encode())
    short = piece * min(length // 2 // size, LONGEST_ANSWER // len(piece))
    room = length - len(frame.encode()) - len(short.encode()) * ("{short}" in frame)
    return frame.replace("{short}", short).replace("{}", piece * max(0, room // size))


def cpu_ms(call: Callable[[], object], seconds: float) -> float:
    """CPU time of a call, the best of five rounds of a fifth of `seconds` in all."""
    best = float("inf")
    for _ in range(5):
        count, begin = 0, time.process_time()
        while (took := time.process_time() - begin) < seconds / 5 or not count:
            call()
            count += 1
        best = min(best, took / count)
    return 1e3 * best


def lengths(seconds: float) -> None:
    """Print CPU time against length, and the exponent of its growth."""
    reward, rows, worst = KKReward(), [], 0.0
    for kind in KINDS:
        times = []
        for length in LENGTHS:
            text = response(kind, length)
            times.append(cpu_ms(lambda text=text: reward(text, TRUTH), seconds / 4))
        long = [place for place, length in enumerate(LENGTHS) if length >= SLOPE_FROM]
        slope = np.polyfit(np.log([LENGTHS[i] for i in long]), np.log([times[i] for i in long]), 1)[0]
        worst = max(worst, times[-1])
        rows.append([kind, *(f"{value:.3f}" for value in times), f"{slope:.2f}"])
    columns = ["response", *(f"{n // 1024} kB" if n < 2**20 else "1 MB" for n in LENGTHS), "exponent from 64 kB"]
    met = "met" if worst <= GOAL_MS else "MISSED"
    show(
        f"CPU ms of the kk reward, 14 people (goal: 1 MB in {GOAL_MS:g} ms at most: {met}, {worst:.1f})", columns, rows
    )


def pool(seconds: float) -> None:
    """Print the time of a response, judged in the process and by processes."""
    rows = []
    for length in (2**11, 2**14):
        jobs = [Job("kk", response("prose, right answer", length), TRUTH)] * 2000
        alone = None
        for workers in (0, 1, 2):
            with RewardPool({"kk": "kk"}, ["kk"], workers=workers) as judges:
                wall, own, begin = [], [], time.monotonic()
                while len(wall) < 5 or time.monotonic() - begin < seconds:
                    clocks = time.perf_counter(), time.process_time()
                    judges.score_all(jobs)
                    wall.append(1e6 * (time.perf_counter() - clocks[0]) / len(jobs))
                    own.append(1e6 * (time.process_time() - clocks[1]) / len(jobs))
            middle = statistics.median(wall)
            alone = alone if alone is not None else middle
            over = f"{middle - alone:+.0f}" if workers else ""
            rows.append([f"{length // 1024} kB", str(workers), f"{middle:.0f}", over, f"{statistics.median(own):.0f}"])
    show(
        "µs a response, batches of 2,000, medians: judged in the rank (0 processes) or by RewardPool's processes",
        ["response", "processes", "wall clock", "against none", "the rank's own CPU"],
        rows,
    )
