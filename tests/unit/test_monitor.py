"""What reaches metrics.jsonl, the console, TensorBoard and wandb, and what never does."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from megatron_dump.monitor import Monitor

SOURCES = ["kk_logic_10", "kk_logic_2", "kk_logic_3"]


def step_metrics(drawn: tuple[str, ...] = ("kk_logic_2", "kk_logic_3")) -> dict[str, float]:
    metrics = {
        "critic/score/mean": 0.25,
        "response_length/mean": 120.4,
        "actor/kl_loss": 0.0021,
        "actor/grad_norm": 0.5,
        "timing_s/gen": 3.0,
        "timing_s/step": 6.0,
    }
    for source in SOURCES:
        metrics |= {f"curriculum/{source}/weight": 1 / 3, f"curriculum/{source}/n_prompts": 0.0}
    for n_rollouts, source in zip((8, 24), drawn, strict=True):
        metrics |= {f"curriculum/{source}/n_prompts": n_rollouts / 8, f"curriculum/{source}/n_rollouts": n_rollouts}
        metrics |= {f"train/{source}/reward/mean": 0.75, f"train/{source}/accuracy": n_rollouts / 32}
    return metrics


def alarm(step: int, **changes) -> dict:
    return {"step": step, "kind": "alarm", "source": "kk_logic_3", "message": "none right", **changes}


def read(log_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (log_dir / name).read_text().splitlines()]


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    monitor = Monitor(tmp_path, SOURCES, 10, 0, {})
    monitor.log_step(1, step_metrics() | {"actor/grad_norm": float("inf")})
    monitor.log_validation(1, {"kk_logic_2": {"accuracy": 0.5, "accuracy_se": 0.1}}, {"kk_logic_2": [0.25, 0.75]})
    rows = read(tmp_path)
    assert rows[0]["step"] == 1
    assert rows[0]["train/kk_logic_2/accuracy"] == 0.25
    assert rows[0]["actor/grad_norm"] is None
    assert rows[1] == {"step": 1, "val/kk_logic_2/accuracy": 0.5, "val/kk_logic_2/accuracy_se": 0.1}
    monitor.close()
    monitor.close()


def test_other_ranks_write_nothing(tmp_path, capsys):
    monitor = Monitor(
        tmp_path / "run", SOURCES, 10, 1, {"create_wandb_logger": True, "create_tensorboard_logger": True}
    )
    monitor.truncate_after(3)
    monitor.log_step(1, step_metrics())
    monitor.log_validation(1, {"kk_logic_2": {"accuracy": 0.5}}, {"kk_logic_2": [0.5]})
    monitor.log_curriculum({"step": 1, "event": "draw"})
    monitor.log_events([alarm(1)])
    monitor.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_resume_repeats_no_step_and_keeps_the_totals(tmp_path, capsys):
    monitor = Monitor(tmp_path, SOURCES, 10, 0, {})
    for step in range(1, 5):
        monitor.log_step(step, step_metrics())
    monitor.log_validation(2, {"kk_logic_2": {"accuracy": 0.125}}, {"kk_logic_2": [0.125]})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 5, "critic/sc')  # the process died here

    resumed = Monitor(tmp_path, SOURCES, 10, 0, {})
    with pytest.raises(ValueError, match="truncate_after"):
        resumed.log_step(3, step_metrics())
    resumed.truncate_after(2)
    capsys.readouterr()
    for step in range(3, 6):
        resumed.log_step(step, step_metrics())
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 2, 3, 4, 5]
    row = next(line for line in capsys.readouterr().out.splitlines() if "kk_logic_3" in line)
    assert row.split() == ["kk_logic_3", "0.333", "███", "3", "15", "0.750", "0.750", "–"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "validation.jsonl"]  # no temporary file


def test_a_broken_line_inside_the_file_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        Monitor(tmp_path, SOURCES, 10, 0, {})


def test_plain_output_has_a_line_a_step_and_a_table_every_five_and_at_the_end(tmp_path, capsys):
    monitor = Monitor(tmp_path, SOURCES, 7, 0, {})
    monitor.log_validation(0, {s: {"accuracy": 0.125} for s in SOURCES}, {s: [0.125] for s in SOURCES})
    for step in range(1, 8):
        monitor.log_step(step, step_metrics())
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 110
    assert (
        "step 3/7  reward 0.250  accuracy 0.625  len 120  kl 0.0021  grad_norm 0.500  seconds 6.0  ETA 0:00:24\n" in out
    )
    assert out.count("seconds: gen 3.0 · step 6.0") == 2
    assert out.count("weight") == 2  # tables at steps 5 and 7
    names = [line.split()[0] for line in out.splitlines() if line.strip().startswith("kk_logic")]
    assert names == ["kk_logic_2", "kk_logic_3", "kk_logic_10"] * 2
    undrawn = next(line for line in out.splitlines() if line.strip().startswith("kk_logic_10"))
    assert undrawn.split() == ["kk_logic_10", "0.333", "███", "0", "0", "–", "–", "0.125"]


def test_the_time_left_counts_the_tokens_left_over_a_resume(tmp_path, capsys):
    for step in (1, 2):  # 100 of 1,000 tokens in 6 s each: 8 more steps, then the same from where a resume found it
        monitor = Monitor(tmp_path, SOURCES, 500, 0, {}, max_generated_tokens=1000)
        monitor.log_step(step, {**step_metrics(), "perf/generated_tokens": 100.0})
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step"))
    assert first.endswith("ETA 0:00:54") and second.endswith("ETA 0:00:48")
    Monitor(tmp_path, SOURCES, 5, 0, {}, max_generated_tokens=1000).log_step(3, step_metrics())
    assert "ETA 0:00:12" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_events_are_kept_and_printed_as_they_come(tmp_path, capsys):
    monitor = Monitor(tmp_path, SOURCES, 10, 0, {})
    monitor.log_events([])
    assert not (tmp_path / "events.jsonl").exists() and not capsys.readouterr().out
    rows = [
        alarm(3),
        {"step": 3, "kind": "short_batch", "source": None, "message": "12 of 16 groups:\n[all] that vary"},
        {"step": 4, "kind": "notice", "source": "kk_logic_3", "message": "the alarm is over " + 100 * "x"},
    ]
    monitor.log_events(rows[:2])
    assert capsys.readouterr().out.splitlines() == [
        "warning at step 3: kk_logic_3: none right",
        "warning at step 3: 12 of 16 groups: [all] that vary",
    ]
    monitor.log_events(rows[2:])
    assert capsys.readouterr().out.splitlines() == [f"notice at step 4: kk_logic_3: {rows[2]['message']}"]
    assert read(tmp_path, "events.jsonl") == rows


def test_a_resume_forgets_later_events_and_decisions(tmp_path):
    monitor = Monitor(tmp_path, SOURCES, 10, 0, {})
    decisions = [{"step": 0, "event": "header"}]
    decisions += [
        {"step": s, "event": kind, "x": [0.1 + 0.2, None, "inf"]} for s in (1, 2, 3) for kind in ("draw", "observe")
    ]
    for decision in decisions:
        monitor.log_curriculum(decision)
    monitor.log_events([alarm(2), alarm(3)])
    with (tmp_path / "curriculum.jsonl").open("a") as file:
        file.write('{"step": 4, "ev')  # the process died here
    Monitor(tmp_path, SOURCES, 10, 0, {}).truncate_after(2)
    assert read(tmp_path, "curriculum.jsonl") == decisions[:5]
    assert read(tmp_path, "events.jsonl") == [alarm(2)]
    monitor.start_over()
    assert read(tmp_path / "previous_1", "events.jsonl") == [alarm(2)]
    assert not (tmp_path / "events.jsonl").exists()


def test_live_view_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    for name, value in {"TERM": "xterm", "COLUMNS": "110", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    terminal = sys.stdout
    monitor = Monitor(tmp_path, SOURCES, 10, 0, {})
    monitor.log_step(1, step_metrics())
    monitor.log_events([alarm(1)])
    monitor.log_step(2, step_metrics())
    monitor.close()
    out = terminal.getvalue()
    assert out.count("warning at step 1: kk_logic_3: none right") == 1  # above the view, not in it
    for expected in ("step 2/10", "ETA 0:00:48", "gen 3.0 · step 6.0", "grad_norm 0.500", "kk_logic_10", "━"):
        assert expected in out
    assert "\x1b[" in out


def test_an_alarm_stands_in_the_table_as_long_as_it_lasts(tmp_path, capsys):
    monitor = Monitor(tmp_path, SOURCES, 10, 0, {})
    for step in range(1, 11):
        monitor.log_step(step, step_metrics() | {"curriculum/kk_logic_10/alarm": float(step < 8)})
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("kk_logic_")]
    assert [row[0] for row in rows if row[-1] == "ALARM"] == ["kk_logic_10"]  # at step 5, no more at step 10
    assert len(rows) == 6


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_hundred_sources_fit_the_view(tmp_path, monkeypatch, capsys, is_terminal):
    """Those under an alarm and the heaviest, in natural order; the others are summed up."""
    if is_terminal:
        monkeypatch.setattr(sys, "stdout", Terminal())
        for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}.items():
            monkeypatch.setenv(name, value)
    terminal = sys.stdout
    names = [f"kk_logic_{k}" for k in range(100)]
    metrics = {f"curriculum/{n}/weight": k / 4950 for k, n in enumerate(names)} | {"timing_s/step": 3.0}
    metrics |= {f"curriculum/{n}/n_prompts": 1.0 for n in names} | {"curriculum/kk_logic_1/alarm": 1.0}
    monitor = Monitor(tmp_path, names, 5, 0, {})
    monitor.log_step(5, metrics)
    monitor.close()
    out = terminal.getvalue() if isinstance(terminal, Terminal) else capsys.readouterr().out
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    out = out[out.rindex("step 5/5") :]  # the view as it ends
    rows = [line for line in out.splitlines() if line.strip().startswith("kk_logic_")]
    assert len(rows) == (20 if is_terminal else 23)
    assert [row.split()[0] for row in rows] == [
        "kk_logic_1",
        *(f"kk_logic_{100 - k}" for k in range(len(rows) - 1, 0, -1)),
    ]
    assert "ALARM" in rows[0]
    hidden = 100 - len(rows)
    weight = sum(k for k in range(100) if f"kk_logic_{k}" not in {row.split()[0] for row in rows}) / 4950
    others = next(line for line in out.splitlines() if "others" in line).split()
    assert others == [str(hidden), "others", f"{weight:.3f}", "█" * round(10 * weight), str(hidden), str(hidden)]
    assert max(map(len, out.splitlines())) <= (80 if is_terminal else 110)
    assert not is_terminal or len(out.splitlines()) <= 30


def test_tensorboard_hides_what_a_resume_repeats(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, value in ((1, 0.25), (2, 0.75)):
        monitor = Monitor(tmp_path, SOURCES, 10, 0, {"create_tensorboard_logger": True})
        monitor.truncate_after(first - 1)
        for step in range(first, 4):
            monitor.log_step(step, {"critic/score/mean": value, "curriculum/kk_logic_2/weight": 1.0})
            monitor.log_samples(
                step, [{"source": "a", "prompt": "p", "completion": "<b>\nx", "reward": 1.0, "correct": True}]
            )
        monitor.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("critic/score/mean")] == [(1, 0.25), (2, 0.75), (3, 0.75)]
    texts = {(e.step, e.tensor_proto.string_val[0]) for e in events.Tensors("samples/a/text_summary")}
    assert texts == {(step, b"    right, reward 1.0\n\n    p\n\n    <b>\n    x") for step in (1, 2, 3)}
    assert (
        b"curriculum/kk_logic_2/weight"
        in b"".join(event.tensor_proto.SerializeToString() for event in events.Tensors("custom_scalars__config__"))
        or "custom_scalars__config__" in events.Tags()["tensors"]
    )


def test_the_summary_pairs_prompts(tmp_path, capsys):
    """Before, after and change with standard errors worked out by hand; the change's over differences of prompts."""
    monitor = Monitor(tmp_path, ["a", "b"], 9, 0, {})
    monitor.log_validation(0, {s: {"accuracy": 0.5} for s in "ab"}, {"a": [0.0, 0.5, 1.0], "b": [0.25, 0.25, 0.25]})
    monitor.log_validation(9, {s: {"accuracy": 0.5} for s in "ab"}, {"a": [0.25, 0.75, 1.0], "b": [0.25, 0.5, 0.0]})
    monitor.close()
    lines = {
        line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines() if "±" in line
    }
    assert lines["a"] == "0.500 ± 0.289 0.667 ± 0.220 +0.167 ± 0.083"
    assert lines["b"] == "0.250 ± 0.000 0.250 ± 0.144 +0.000 ± 0.144"
    assert lines["mean"] == "0.375 ± 0.144 0.458 ± 0.132 +0.083 ± 0.083"


def test_a_new_run_in_an_old_folder_moves_its_files(tmp_path):
    old = Monitor(tmp_path, ["a"], 9, 0, {})
    old.log_step(1, {"x": 1.0})
    new = Monitor(tmp_path, ["a"], 9, 0, {})
    new.start_over()
    new.log_step(1, {"x": 2.0})
    assert '"x": 1.0' in (tmp_path / "previous_1/metrics.jsonl").read_text()
    assert '"x": 2.0' in (tmp_path / "metrics.jsonl").read_text()
