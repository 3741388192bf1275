"""Reward processes: every response gets its own answer in its own place, whatever becomes of the others."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_dump.rewards import GroundTruthError, registry
from megatron_dump.rewards.workers import Faults, Job, RewardPool
from tests.unit import faulty_rewards
from tests.unit.kk_styles import ground_truth

OBEY = "tests.unit.faulty_rewards:obey"
REPO = Path(__file__).resolve().parents[2]


def pool(workers=2, mapping=None, sources=("a", "b"), **options):
    return RewardPool(mapping or {"*": OBEY}, sources, workers=workers, **options)


def jobs_of(*texts, source="a"):
    return [Job(source, text, "truth") for text in texts]


def pids(of):
    return [worker.process.pid for worker in of._processes._workers]


def alive(pid):
    """Running, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, within_s=10.0):
    """No such process, not even a zombie of this one."""
    end = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_answers_come_in_order_and_whole(workers):
    jobs = [Job("ab"[i % 2], f"{i / 7} näme \ud800 {i}", "t" * (i % 5)) for i in range(1000)]
    with pool(workers) as rewards:
        for batch in (jobs, jobs[::-1], [], jobs[:1]):
            scores, faults = rewards.score_all(batch)
            assert [s.reward for s in scores] == [float(job.text.split()[0]) for job in batch]
            assert [s.reason for s in scores] == [job.text.partition(" ")[2] for job in batch]
            assert [s.components for s in scores] == [{"truth": len(job.ground_truth)} for job in batch]
            assert all(s.correct and s.well_formed for s in scores)
            assert faults == {"a": Faults(), "b": Faults()}


@pytest.mark.parametrize("reward", [float("inf"), float("-inf"), 1e-300, 0.1])
def test_any_number_is_a_reward(reward):
    with pool(1) as rewards:
        assert rewards.score_all(jobs_of(repr(reward)))[0][0].reward == reward
        assert math.isnan(rewards.score_all(jobs_of("nan"))[0][0].reward)


CRASHES = {
    "segfault": "the process died: killed by SIGSEGV",
    "exit 3": "the process died: exit code 3",
    "quit 4": "SystemExit: 4",
    "devour": "the process died: out of memory",
    "garble nonsense": "the process wrote something else than an answer",
    'garble ["ready"]': "the process wrote something else than an answer",
    "raise words": "KeyError: 'words'",
}
TIMEOUTS = {"sleep 600": "over 1 s", "spin": "over 1 s", "deaf": "over 1 s", "late too hard": "too hard"}


@pytest.mark.parametrize("text", [*CRASHES, *TIMEOUTS])
def test_a_fault_is_scored_and_counted_and_hits_nobody_else(text):
    around = [str(i) for i in range(20)]
    jobs = jobs_of(*around) + jobs_of(text, source="b") + jobs_of(*around)
    crash = text in CRASHES
    with pool(1, timeout_s=60.0 if crash else 1.0, memory_gb=1.0, on_crash=-7.0, on_timeout=-9.0) as rewards:
        for _ in range(2):  # the pool is as good as before
            scores, faults = rewards.score_all(jobs)
            assert [s.reward for s in scores] == [*map(float, around), -7.0 if crash else -9.0, *map(float, around)]
            assert (scores[20].correct, scores[20].well_formed) == (False, False)
            reason = f"crash: {CRASHES[text]}" if crash else f"timeout: {TIMEOUTS[text]}"
            assert scores[20].reason == reason
            assert faults == {"a": Faults(), "b": Faults(timeouts=not crash, crashes=crash)}


def test_faults_are_dropped_unless_told_otherwise():
    with pool(1) as rewards:
        scores, faults = rewards.score_all(jobs_of("1", "exit 1", "late", "2"))
    assert [math.isnan(s.reward) for s in scores] == [False, True, True, False]
    assert faults["a"] == Faults(timeouts=1, crashes=1)


def test_in_process_exceptions_are_counted_alike():
    with pool(0, on_crash=-1.0) as rewards:
        scores, faults = rewards.score_all(jobs_of("1", "raise it", "late", "quit 1", "2"))
    assert [s.reward for s in scores] == pytest.approx([1, -1, math.nan, -1, 2], nan_ok=True)
    assert faults["a"] == Faults(timeouts=1, crashes=2)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_mixture_of_faults(seed):
    """Against what each text alone deserves."""
    rng = random.Random(seed)
    fatal = ["exit 1", "segfault", "raise x", "late x", "sleep 600"]
    texts = [str(i) if rng.random() < 0.95 else rng.choice(fatal) for i in range(300)]
    with pool(2, timeout_s=1.0, on_crash=-7.0, on_timeout=-9.0) as rewards:
        scores, faults = rewards.score_all(jobs_of(*texts))
    late = [text.split()[0] in ("late", "sleep") for text in texts]
    wanted = [float(t) if t.isdigit() else -9.0 if is_late else -7.0 for t, is_late in zip(texts, late, strict=True)]
    assert [s.reward for s in scores] == wanted
    assert faults["a"] == Faults(timeouts=wanted.count(-9.0), crashes=wanted.count(-7.0))


def test_a_time_limit_is_each_responses_own():
    with pool(1, timeout_s=1.0) as rewards:  # 3 seconds in all
        scores, faults = rewards.score_all(jobs_of(*["sleep 0.3"] * 10))
    assert faults["a"] == Faults() and all(s.reason == "survived sleep" for s in scores)


def test_long_texts_pass():
    """More than any pipe holds, in both directions at once."""
    texts = [f"{i} {'x' * 3_000_000}" for i in range(8)]
    with pool(2) as rewards:
        scores, _ = rewards.score_all(jobs_of(*texts))
    assert [s.reward for s in scores] == [*map(float, range(8))]
    assert {len(s.reason) for s in scores} == {500}


def test_what_a_function_prints_or_reads_is_not_the_protocol(capfd):
    with pool(1) as rewards:
        scores, _ = rewards.score_all(jobs_of("print [1]", "read", "5"))
    assert [s.reason for s in scores] == ["survived print", "survived read", ""]
    assert "[1]" in capfd.readouterr().err


def test_processes_are_light():
    with pool(1, {"*": OBEY, "kk": "kk"}, ["a", "kk"]) as rewards:
        scores, _ = rewards.score_all(jobs_of("loaded torch transformers omegaconf pyarrow sympy megatron.core pytest"))
    assert scores[0].reason == "crash: RuntimeError: none of them"


def test_a_bad_ground_truth_stops_the_run_and_not_the_pool():
    for workers in (0, 1):
        with pool(workers) as rewards:
            with pytest.raises(GroundTruthError, match="a row of a: no such puzzle"):
                rewards.score_all(jobs_of("1", "truth no such puzzle", "2"))
            assert rewards.score_all(jobs_of("3"))[0][0].reward == 3.0


def test_what_is_no_score_is_a_crash():
    with pool(1, {"*": "tests.unit.faulty_rewards:no_score"}) as rewards:
        assert rewards.score_all(jobs_of("1"))[0][0].reason == "crash: TypeError: it returned 1.0, not a Score"


def test_kk_and_math_in_processes():
    truth = ground_truth([("Zoey", "knave"), ("Sam", "knight")])
    mapping = {"kk_*": {"name": "kk", "mode": "binary"}, "math": {"name": "math", "timeout_s": 1}}
    right = [Job("kk_2", "<think></think><answer>Zoey is a knave, Sam is a knight</answer>", truth)]
    right += [Job("math", "<think></think><answer>\\frac{2}{4}</answer>", "0.5")]
    hard = [Job("math", "<think></think><answer>9^{9^{9^{9}}}</answer>", "x+4")]
    with RewardPool(mapping, ["kk_2", "math"], workers=1, timeout_s=20) as rewards:
        scores, faults = rewards.score_all(right + hard + right)
    assert [s.reward for s in scores] == pytest.approx([1.0, 3.0, math.nan, 1.0, 3.0], nan_ok=True)
    assert faults == {"kk_2": Faults(), "math": Faults(timeouts=1)}


def test_functions_registered_at_run_time_reach_the_processes(monkeypatch):
    monkeypatch.setattr(registry, "_TARGETS", dict(registry._TARGETS))
    registry.register_reward("mine", faulty_rewards.with_option)
    registry.register_reward("constant", "tests.unit.faulty_rewards:make_constant")
    mapping = {"a": {"name": "mine", "bonus": 2.0}, "b": {"name": "constant", "value": 5.0}}
    with pool(1, mapping) as rewards:
        scores, _ = rewards.score_all(jobs_of("x") + jobs_of("y", source="b"))
        assert [s.reward for s in scores] == [3.0, 5.0]
    registry.register_reward("hidden", lambda text, truth: None)
    with pytest.raises(ValueError, match=r"'hidden' .* cannot be imported by a reward process; put it at the top"):
        pool(1, {"*": "hidden"})
    pool(0, {"*": "hidden"}).close()
    pool(1, mapping).close()  # does not ask for it


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"*": "kkk"}, r"model\.data\.rewards\.\*\.name: unknown reward function 'kkk'; known: .*\bkk\b"),
        ({"*": {"name": "kk", "mode": "dumb"}}, r"model\.data\.rewards\.\*\.mode: 'dumb' is unknown; known: dump"),
        ({"a": "kk"}, r"model\.data\.rewards: no reward function for source 'b'; patterns: a"),
        ({"*": "no.such:thing"}, r"\*\.name: cannot import reward function 'no\.such:thing'"),
    ],
)
def test_a_bad_mapping_is_refused_at_once(mapping, message):
    for workers in (0, 1):
        with pytest.raises(ValueError, match=message):
            pool(workers, mapping)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": -1},
        {"workers": True},
        {"timeout_s": 0},
        {"memory_gb": -1.0},
        {"on_crash": math.inf},
        {"on_timeout": "drop"},
        {"start_timeout_s": None},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        pool(**options)


def test_unknown_sources_and_closed_pools():
    rewards = pool(1)
    with pytest.raises(ValueError, match="source 'c' has no reward function; known: a, b"):
        rewards.score_all(jobs_of("1", source="c"))
    rewards.close()
    rewards.close()
    with pytest.raises(RuntimeError, match="closed"):
        rewards.score_all(jobs_of("1"))


def test_processes_end_with_their_pool_and_leave_no_zombies():
    rewards = pool(2, timeout_s=0.5)
    first = pids(rewards)
    rewards.score_all(jobs_of("exit 1", "sleep 600", "1"))
    second = pids(rewards)
    assert len(second) == 2 and not {*first} & {*second}
    rewards.close()
    assert all(gone(pid) for pid in first + second)
    rewards = pool(1)
    pid = pids(rewards)[0]
    del rewards
    assert gone(pid)


def test_what_a_function_started_ends_with_it(tmp_path):
    with pool(1, timeout_s=1.0) as rewards:
        _, faults = rewards.score_all(jobs_of(f"grandchild {tmp_path / 'pid'}"))
    assert faults["a"].timeouts == 1
    deadline = time.monotonic() + 10
    while alive(pid := int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_a_process_that_died_idle_is_nobodys_crash():
    with pool(2) as rewards:
        for pid in pids(rewards):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        scores, faults = rewards.score_all(jobs_of("1", "2"))
    assert [s.reward for s in scores] == [1.0, 2.0] and faults["a"] == Faults()


def test_threads_that_made_the_processes_may_end():
    """The kernel ends a process whose parent's thread ends: that must not be a caller's."""
    made = []
    thread = threading.Thread(target=lambda: made.append(pool(2)))
    thread.start()
    thread.join()
    with made[0] as rewards:
        first = pids(rewards)
        for _ in range(3):
            scores, faults = rewards.score_all(jobs_of("1", "2", "3"))
            assert [s.reward for s in scores] == [1.0, 2.0, 3.0] and faults["a"] == Faults()
        assert pids(rewards) == first


# A shell without job control starts its background jobs with SIGINT ignored, and a test run may be one.
PARENT = """
import json, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from megatron_dump.rewards.workers import Job, RewardPool
{before}
pool = RewardPool({{"*": "tests.unit.faulty_rewards:obey"}}, ["a"], workers=2, timeout_s=600)
say = lambda x: print(json.dumps(x), flush=True)
pids = lambda: [w.process.pid for w in pool._processes._workers]
say(pids())
try:
    {during}
except KeyboardInterrupt:
    say([s.reward for s in pool.score_all([Job("a", str(i), "") for i in range(300)])[0]])
    say(pids())
    {after}
"""
HANG = 'pool.score_all([Job("a", t, "") for t in ("1", "spin", "2", "sleep 600")])'


def parent(before="", during=HANG, after="pool.close()"):
    """A process that has a pool, its first pids read."""
    code = PARENT.format(before=before, during=during, after=after)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPO)
    return process, json.loads(process.stdout.readline())


def test_no_orphans_when_the_parent_is_killed():
    process, children = parent()
    time.sleep(0.5)
    assert all(alive(pid) for pid in children)
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in children)


@pytest.mark.parametrize("after", ["pool.close()", "pass", "os.kill(os.getpid(), 15)"])
def test_an_interrupted_batch_leaves_nothing_behind(after):
    process, children = parent(after=after)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert json.loads(process.stdout.readline()) == [*map(float, range(300))]  # not the answers of the batch before
    more = json.loads(process.stdout.readline())
    process.wait(timeout=20)
    assert all(gone(pid) for pid in children + more)


def test_beside_torch_its_process_group_and_busy_threads():
    before = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(3):
    threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(int, 1)], daemon=True).start()
torch.ones(300, 300) @ torch.ones(300, 300)
"""
    during = """
    s, f = pool.score_all([Job("a", t, "") for t in ["1", "exit 1"] * 10])
    say([sum(x.correct for x in s), f["a"].crashes])
    pool.close(); os._exit(0)"""
    process, children = parent(before, during.strip())
    assert json.loads(process.stdout.readline()) == [10, 10]
    process.wait(timeout=20)
    assert all(gone(pid) for pid in children)


def test_a_fork_of_the_parent_leaves_the_processes_alone():
    with pool(1) as rewards:
        child = os.fork()
        if not child:
            rewards._processes._finalize()  # what the end of the interpreter would call
            os._exit(0)
        os.waitpid(child, 0)
        assert rewards.score_all(jobs_of("1"))[0][0].reward == 1.0
