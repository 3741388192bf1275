"""The report of a synthetic run that moves as a curriculum does: easy sources first, then harder ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_dump.report import write_report
from megatron_dump.report.figure import draw_figure
from megatron_dump.report.run import read_run


def write_run(log_dir: Path, n_sources: int, n_steps: int, seed: int = 0) -> None:
    """metrics.jsonl and samples.jsonl with logistic learning curves and some sources not drawn in some steps."""
    rng = np.random.default_rng(seed)
    names = [f"kk_logic_{i + 2}" for i in range(n_sources)]
    lines: list[dict] = []

    def accuracy(step: int) -> np.ndarray:
        return 1 / (1 + np.exp(0.7 * np.arange(n_sources) + 1.0 - 5.0 * step / n_steps))

    def validate(step: int) -> None:
        passed = rng.binomial(100, accuracy(step)) / 100
        row = {f"val/{name}/accuracy": value for name, value in zip(names, passed, strict=True)}
        row |= {f"val/{n}/accuracy_se": (p * (1 - p) / 100) ** 0.5 for n, p in zip(names, passed, strict=True)}
        lines.append({"step": step, **row})

    validate(0)
    for step in range(1, n_steps + 1):
        truth = accuracy(step)
        learnability = np.sqrt(truth * (1 - truth)) + rng.normal(0, 0.02, n_sources)
        weights = np.exp(learnability / 0.1) / np.exp(learnability / 0.1).sum()
        prompts = rng.multinomial(16, weights)
        row = {"step": step, "critic/score/mean": float(weights @ truth + rng.normal(0, 0.05))}
        for name, w, a, n, p in zip(names, weights, learnability, prompts, truth, strict=True):
            row |= {f"curriculum/{name}/weight": w, f"curriculum/{name}/mean_abs_adv": a}
            row |= {f"curriculum/{name}/n_prompts": float(n), f"curriculum/{name}/n_rollouts": 8.0 * n}
            if n:
                row |= {f"train/{name}/accuracy": rng.binomial(8 * n, p) / (8 * n), f"train/{name}/reward/mean": p}
        row |= {
            "actor/grad_norm": rng.lognormal(-0.5, 0.3),
            "actor/kl_loss": 0.004 * step / n_steps + rng.uniform(0, 1e-3),
        }
        row |= {"response_length/mean": 150 + 60 * step / n_steps + rng.normal(0, 8)}
        row |= {"response_length/clip_ratio": max(0.0, 0.2 - 0.2 * step / n_steps + rng.normal(0, 0.02))}
        timing = {
            "draw": 0.01,
            "gen": 4.0,
            "reward": 0.3,
            "old_log_prob": 0.8,
            "ref": 0.7,
            "adv": 0.02,
            "update_actor": 2.4,
        }
        row |= {f"timing_s/{phase}": seconds * rng.uniform(0.9, 1.2) for phase, seconds in timing.items()}
        lines.append(row)
        if step % 10 == 0:
            validate(step)
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {
        "step": 10,
        "source": "kk_logic_2",
        "prompt": "Is <Zoey> a knight?",
        "completion": "<answer> (1) Zoey is a knave",
    }
    (log_dir / "samples.jsonl").write_text(json.dumps({**sample, "reward": 1.0, "correct": True}) + "\n")


@pytest.mark.parametrize(("n_sources", "n_steps"), [(2, 1), (12, 30)])
def test_report_is_one_self_contained_page_and_one_picture(tmp_path, n_sources, n_steps):
    write_run(tmp_path / "kk", n_sources, n_steps)
    html_path, png_path = write_report(tmp_path / "kk")
    page = html_path.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import|url\(""", page)
    assert "Is &lt;Zoey&gt; a knight?" in page  # text of a model or a data set is never markup
    assert [page.index(f"<td>kk_logic_{i + 2}</td>") for i in range(n_sources)] == sorted(
        page.index(f"<td>kk_logic_{i + 2}</td>") for i in range(n_sources)
    )
    picture = imread(png_path)
    assert picture.shape[1] >= 1600
    assert picture[..., :3].std() > 0.05


def test_series_have_gaps_where_a_source_was_not_drawn(tmp_path):
    lines = [
        {"step": 1, "train/a/accuracy": 0.5, "curriculum/a/weight": 1.0},
        {"step": 3, "curriculum/a/weight": None},
        {"step": 2, "curriculum/a/weight": 0.5},
        {"step": 3, "val/a10/accuracy": 0.5},
        {"step": 3, "val/a9/accuracy": 0.25},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "train/a/acc')  # still being written
    run = read_run(tmp_path)
    assert list(run.steps) == [1, 2, 3]
    assert run.sources == ["a", "a9", "a10"]
    np.testing.assert_array_equal(run.series("curriculum/a/weight"), [1.0, 0.5, np.nan])
    np.testing.assert_array_equal(run.series("train/a/accuracy"), [0.5, np.nan, np.nan])
    assert run.tested("a9", -1) == 0.25
    assert np.isnan(run.tested("a", -1))


def test_moving_average_skips_what_is_not_known(tmp_path):
    rows = [{"step": s, "x": float(s) if s != 20 else None} for s in range(24)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    assert run.window == 2
    np.testing.assert_allclose(run.smooth("x")[[0, 5, 20, 21, 23]], [0.0, 4.5, 19.0, 21.0, 22.5])


def test_a_run_without_validation_kl_or_samples(tmp_path):
    rows = [{"step": s, "curriculum/a/weight": 1.0, "train/a/accuracy": 0.5, "critic/score/mean": 0.5} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html_path, _ = write_report(tmp_path)
    assert "Sample completions" not in html_path.read_text()


def _with_events(log_dir: Path, events: list[dict]) -> str:
    """The page of a run of 12 sources with events."""
    write_run(log_dir, 12, 30)
    (log_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return write_report(log_dir)[0].read_text()


def test_events_have_a_table_and_alarms_a_mark_on_the_weights(tmp_path):
    dropped = [{"step": s, "kind": "dropped", "source": "kk_logic_5", "message": f"{s} NaN"} for s in range(1, 31)]
    short = [{"step": s, "kind": "short_batch", "source": None, "message": "12 of 16"} for s in range(1, 31)]
    alarms = [{"step": s, "kind": "alarm", "source": "kk_logic_9", "message": "none <right>"} for s in (7, 29)]
    events = sorted([*dropped, *short, *alarms], key=lambda event: event["step"])
    page = _with_events(tmp_path / "kk", events)
    table = re.search(r'<h2>Events</h2><table class="events">(.*?)</table>', page)
    assert table is not None
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in table[1].split("<tr>")[2:]]
    assert cells[0] == ["30", "short batch", "–", "12 of 16"]  # the latest first
    assert len(cells) == 50
    assert ["29", "alarm", "kk_logic_9", "none &lt;right&gt;"] in cells
    assert "Earlier, in events.jsonl: 6 × dropped, 6 × short batch." in page  # 62 events, 50 shown

    (weights, *_) = draw_figure(read_run(tmp_path / "kk")).axes
    (marks,) = weights.get_lines()
    assert list(marks.get_xdata()) == [7, 29]
    assert weights.get_title(loc="right") == "▼ alarm"


def test_a_run_without_events_or_format_failures_has_no_word_of_them(tmp_path):
    write_run(tmp_path / "kk", 2, 3)
    page = write_report(tmp_path / "kk")[0].read_text()
    assert "Events" not in page and "format failures" not in page
    assert draw_figure(read_run(tmp_path / "kk")).axes[0].get_title(loc="right") == ""


def test_format_failures_have_a_column(tmp_path):
    rows = [
        {"step": s, "curriculum/a/weight": 0.5, "curriculum/b/weight": 0.5, "curriculum/a/format_failure": 0.25 * s}
        for s in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path)[0].read_text()
    lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in page.split("<h2>Sources</h2>")[1].split("<tr>")[1:4]]
    assert [line[-1] for line in lines] == ["format failures", "0.500", "–"]  # b was never drawn
    assert len({len(line) for line in lines}) == 1


def test_errors_are_one_clear_line(tmp_path):
    command = [sys.executable, "-m", "megatron_dump.report", str(tmp_path)]
    missing = subprocess.run(command, check=False, capture_output=True, text=True)
    assert missing.returncode == 1
    assert "metrics.jsonl" in missing.stderr and "Traceback" not in missing.stderr
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/a/accuracy": 0.5}\n')
    with pytest.raises(ValueError, match="no training step"):
        write_report(tmp_path)
