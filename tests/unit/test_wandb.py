"""wandb gets what the run's files say; whatever becomes of it, the run goes on, and no secret is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dump.monitor import Monitor, trackers
from tests.unit.recorded_runs import write_jsonl

SECRET = "0123456789abcdef0123456789abcdef01234567"  # 40 characters, as wandb's own keys
SOURCES = ["kk_logic_2", "kk_logic_3"]
# Takes the place of wandb in the process that uploads. It keeps its calls in a file, and one of them raises or hangs.
FAKE = """
import json, os, time
def call(name, /, **details):
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(json.dumps({"call": name, **details}) + "\\n")
    if os.environ["FAKE_FAILING"] == name:
        raise ConnectionError("no server for key " + os.environ["WANDB_API_KEY"])
    if os.environ["FAKE_HANGING"] == name:
        time.sleep(600)
def Settings(**kwargs): return kwargs
def Table(columns, data): return {"columns": columns, "data": data}
class plot:
    def line_series(xs, ys, keys, title, xname): return {"xs": xs, "ys": ys, "keys": keys}
class Run:
    def log(self, values, step): call("log", values=values, step=step)
    def finish(self): call("finish")
def init(project=None, name=None, id=None, resume=None, dir=None, settings=None):
    call("init", project=project, name=name, id=id, resume=resume, settings=settings)
    return Run()
"""
MANAGER = {"create_wandb_logger": True, "wandb_logger_kwargs": {"project": "dump", "name": "kk"}}


@pytest.fixture
def fake(tmp_path_factory, monkeypatch):
    """Makes the fake the wandb that is imported; returns a function that reads its calls."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "wandb.py").write_text(FAKE)
    environment = {"PYTHONPATH": str(folder), "FAKE_CALLS": str(folder / "calls"), "WANDB_API_KEY": SECRET}
    for name, value in {**environment, "FAKE_FAILING": "", "FAKE_HANGING": ""}.items():
        monkeypatch.setenv(name, value)

    def calls(name: str) -> list[dict]:
        lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
        return [row for line in lines if (row := json.loads(line))["call"] == name]

    return calls


def metrics(step: int) -> dict[str, float]:
    weights = {f"curriculum/{s}/weight": w for s, w in zip(SOURCES, (step / 100, 1 - step / 100), strict=True)}
    return {"critic/score/mean": step / 10, "actor/kl_loss": float("nan"), **weights}


def sample(source: str, step: int) -> dict:
    texts = {"prompt": f"Who is a knave? ({step})", "completion": "Zoey", "reason": "wrong"}
    return {"source": source, **texts, "reward": -0.5, "correct": False}


def train(log_dir: Path, steps: range, manager: dict | None = None) -> float:
    """A run of these steps; the longest time that one of them took."""
    monitor, longest = Monitor(log_dir, SOURCES, 100, 0, manager or MANAGER), 0.0
    monitor.truncate_after(steps[0] - 1)
    for step in steps:
        start = time.perf_counter()
        monitor.log_step(step, metrics(step))
        monitor.log_samples(step, [sample(SOURCES[step % 2], step)])
        longest = max(longest, time.perf_counter() - start)
    monitor.close()
    return longest


def test_it_gets_every_step_and_tables_of_samples_and_weights(tmp_path, fake):
    train(tmp_path, range(1, 13))
    (started,) = fake("init")
    assert (started["project"], started["name"], started["resume"]) == ("dump", "kk", "allow")
    assert started["id"] == (tmp_path / "wandb_run_id").read_text()
    scalars = {c["step"]: c["values"] for c in fake("log") if "critic/score/mean" in c["values"]}
    assert list(scalars) == list(range(1, 13))
    assert scalars[7]["critic/score/mean"] == 0.7
    assert "actor/kl_loss" not in scalars[7] and "step" not in scalars[7]  # NaN: a gap
    tables = {c["step"]: c["values"] for c in fake("log") if "samples" in c["values"]}
    assert list(tables) == [10, 12]  # every tenth step, and at the end
    rows = [dict(zip(tables[10]["samples"]["columns"], row, strict=True)) for row in tables[10]["samples"]["data"]]
    assert rows == [{"step": step, **sample(SOURCES[step % 2], step)} for step in (10, 9)]  # the latest of each source
    chart = tables[12]["curriculum/weights"]
    assert chart["xs"] == list(range(1, 13)) and chart["keys"] == SOURCES
    assert chart["ys"][0] == [step / 100 for step in range(1, 13)]
    assert len(fake("finish")) == 1


def test_a_resume_goes_on_with_the_same_run_and_repeats_nothing(tmp_path, fake):
    train(tmp_path, range(1, 5))
    train(tmp_path, range(3, 7))  # from the checkpoint of step 2
    first, second = fake("init")
    assert first["id"] == second["id"]
    scalars = [c["step"] for c in fake("log") if "critic/score/mean" in c["values"]]
    assert scalars == [1, 2, 3, 4, 3, 4, 5, 6]  # wandb itself keeps the first of what a resume does again
    chart = next(c for c in reversed(fake("log")) if "curriculum/weights" in c["values"])["values"][
        "curriculum/weights"
    ]
    assert chart["xs"] == [1, 2, 3, 4, 5, 6]


def told(tmp_path: Path, capfd, caplog) -> str:
    """Everything that was printed or logged; no secret in it, nor in any file."""
    said = "".join(capfd.readouterr()) + caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert SECRET not in said
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    return said


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_an_outage_costs_one_warning(tmp_path, fake, monkeypatch, capfd, caplog, failing):
    monkeypatch.setenv("FAKE_FAILING", failing)
    train(tmp_path, range(1, 4))
    said = told(tmp_path, capfd, caplog)
    assert said.count("warning") == 1
    assert "wandb: ConnectionError: no server for key ***" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("hanging", ["init", "log", "finish"])
def test_a_server_that_hangs_holds_up_no_step_and_the_end_only_for_so_long(
    tmp_path, fake, monkeypatch, capfd, caplog, hanging
):
    monkeypatch.setenv("FAKE_HANGING", hanging)
    monkeypatch.setattr(trackers, "FINISH_S", 1.0)
    start = time.perf_counter()
    longest = train(tmp_path, range(1, 40))
    assert longest < 5 and time.perf_counter() - start < 60  # against 600
    assert "did not take everything within 1 s" in told(tmp_path, capfd, caplog)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 39


def test_wandb_offline_for_real(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("WANDB_SILENT", "true")
    kwargs = {**MANAGER["wandb_logger_kwargs"], "mode": "offline"}
    train(tmp_path, range(1, 13), {**MANAGER, "wandb_logger_kwargs": kwargs})
    assert "warning" not in told(tmp_path, capfd, caplog).lower()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    kept = log.read_bytes()
    for expected in (b"critic/score/mean", b"curriculum/weights", b"samples"):
        assert expected in kept
    tables = [path.read_text() for path in (folder / "files").rglob("*.table.json")]
    assert any("Who is a knave? (12)" in table for table in tables)


@pytest.mark.slow
def test_a_real_server_that_never_answers(tmp_path, monkeypatch, capfd, caplog):
    """Connections are accepted by the kernel, and then nothing comes."""
    monkeypatch.setattr(trackers, "FINISH_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        longest = train(tmp_path, range(1, 4))
    assert longest < 5
    assert "warning: wandb" in told(tmp_path, capfd, caplog)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_wrong_arguments_and_a_missing_package_are_refused_at_once(tmp_path, fake, monkeypatch):
    kwargs = {"create_wandb_logger": True, "wandb_logger_kwargs": {"projct": "dump"}}
    with pytest.raises(ValueError, match=r"exp_manager\.wandb_logger_kwargs\.projct is no argument of wandb\.init"):
        Monitor(tmp_path, SOURCES, 10, 0, kwargs)
    (Path(os.environ["PYTHONPATH"]) / "wandb.py").write_text("raise ImportError('none here')")
    with pytest.raises(ValueError, match="create_wandb_logger=true, and wandb cannot be imported .*none here"):
        Monitor(tmp_path, SOURCES, 10, 0, MANAGER)


def test_a_killed_run_leaves_no_process_and_is_finished_at_wandb(tmp_path, fake):
    """Its own children, forked while wandb's process was there, hold that one's stdin open."""
    program = f"""
import os, signal, time
from megatron_dump.monitor import Monitor
monitor = Monitor({str(tmp_path)!r}, ["a"], 10, 0, {{"create_wandb_logger": True}})
monitor.log_step(1, {{"x": 1.0}})
child = os.fork()
if not child:
    os.close(1)
    time.sleep(120)
    os._exit(0)
print(monitor._trackers[0]._process.pid, child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    repo = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": f"{repo}:{os.environ['PYTHONPATH']}"}
    with (tmp_path / "stderr").open("w") as stderr:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    process, child = map(int, done.stdout.splitlines()[-1].split())
    assert process > 1 and child > 1
    try:
        deadline = time.monotonic() + 60
        while _is_running(process):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.kill(child, signal.SIGKILL)
    assert [row["step"] for row in fake("log")] == [1]
    assert len(fake("finish")) == 1


def test_what_a_killed_run_had_sent_is_read(tmp_path, fake):
    """The run is gone before its process looks for the first time, and stdin stays open."""
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "x": 1.0}])
    repo = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": f"{repo}:{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", "from megatron_dump.monitor.wandb_process import main; main()"]
    first = {"folder": str(tmp_path), "options": {}, "parent": 0, "finish_s": 60}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(b"".join(json.dumps(line).encode() + b"\n" for line in (first, {"from_step": 1})))
        process.stdin.flush()
        assert process.wait(60) == 0
    assert [row["step"] for row in fake("log")] == [1] and len(fake("finish")) == 1


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
