"""An engine in a process that needs neither torch nor a model: completions are a function of prompt, seed and weights.

`ToyHandle` drives it as rollout/engine.py's EngineHandle. Faults are real ones: tests kill, stop or starve the process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]


def complete(prompt, seed, version):
    """(token ids, log-probs, finished): of a length between 1 and 12."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((int(seed), version, *map(int, prompt)))))
    length = int(rng.integers(1, 13))
    return rng.integers(0, 1000, length), -rng.random(length).astype(np.float32), bool(rng.random() < 0.5)


def main(folder: str, delay_s: float, seed: int) -> None:
    """Serve: pickles of (kind, what) on stdin, of the answers on stdout.

    Files in `folder` steer it: `stillborn` ends it at its start, `slow` holds a delay in seconds for each call.
    """
    out, version, rng = os.fdopen(os.dup(1), "wb"), 0, np.random.default_rng(seed)
    os.dup2(2, 1)
    if Path(folder, "stillborn").exists():
        print("I was never meant to be", file=sys.stderr)
        sys.exit(3)
    pickle.dump("ready", out), out.flush()
    while True:
        try:
            kind, what = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if kind == "generate":
            with Path(folder, "served").open("a") as served:
                served.write(f"{os.getpid()} {version} {[(p.tolist(), s) for p, s in what]!r}\n")
        if delay_s:
            time.sleep(rng.exponential(delay_s))
        if (slow := Path(folder, "slow")).exists():
            time.sleep(float(slow.read_text()))
        answer = None
        if kind == "generate":
            answer = [[(*complete(prompt, seed, version), version) for seed in seeds] for prompt, seeds in what]
        elif kind == "load_weights":
            version = what
        pickle.dump(answer, out), out.flush()


class ToyHandle:
    def __init__(self, folder, delay_s=0.0, seed=0):
        from megatron_dump.rollout.engine import EngineDied, EngineOutput

        self.died, self.output = EngineDied, EngineOutput
        self.folder, self.delay_s, self.seed, self.loads, self.pids = Path(folder), delay_s, seed, [], []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self):
        code = f"from tests.unit.toy_engine import main; main({str(self.folder)!r}, {self.delay_s}, {self.seed})"
        with open(self.folder / "log", "ab") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, **pipes)
        self.pids.append(self.process.pid)
        self.waiting = queue.SimpleQueue()  # the futures in the order they are answered
        process, waiting = self.process, self.waiting
        try:
            assert pickle.load(process.stdout) == "ready"  # our own process's
        except EOFError:
            process.wait()
            raise self.died(self.words(process)) from None
        threading.Thread(target=self.read, args=(process, waiting), daemon=True).start()

    def words(self, process):
        tail = (self.folder / "log").read_text().strip().splitlines()[-1:]
        return f"exit code {process.wait()}, last words {' '.join(tail)!r}; log: {self.folder / 'log'}"

    def read(self, process, waiting):
        while True:
            try:
                answer = pickle.load(process.stdout)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):
                break
            waiting.get().set_result(answer)
        while not waiting.empty():
            waiting.get().set_exception(self.died(self.words(process)))

    def call(self, kind, what):
        future = Future()
        self.waiting.put(future)
        try:
            pickle.dump((kind, what), self.process.stdin)
            self.process.stdin.flush()
        except (OSError, ValueError):
            if not future.done():  # the reader may have told already
                self.read(self.process, self.waiting)
        return future

    def generate(self, requests):
        answers = Future()

        def translate(done):
            if done.exception():
                answers.set_exception(done.exception())
            else:
                answers.set_result([[self.output(*row) for row in group] for group in done.result()])

        self.call("generate", [(r.prompt, r.seeds) for r in requests]).add_done_callback(translate)
        return answers

    def load_weights(self, version, link):
        self.loads.append((version, link))
        return self.call("load_weights", version)

    def sleep(self):
        return self.call("sleep", None)

    def wake(self):
        return self.call("wake", None)

    def alive(self):
        return self.process.poll() is None

    def restart(self):
        self.close()
        self.start()

    def close(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # it may hold what the process died too early to be told
            self.process.stdin.close()

    def served(self):
        """Every call of `generate` that began: (pid, version, [(prompt, seeds)])."""
        path = self.folder / "served"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [line.split(" ", 2) for line in lines]
        return [(int(pid), int(version), eval(what, {})) for pid, version, what in rows]
