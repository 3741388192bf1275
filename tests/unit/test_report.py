"""The report of a synthetic run that moves as a curriculum does: easy sources first, then harder ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf

from megatron_dump.report import write_report
from megatron_dump.report.figure import STYLE, draw_figure
from megatron_dump.report.run import read_run
from megatron_dump.report.settings import changes, flatten
from tests.unit.recorded_runs import SAMPLE, write_jsonl, write_run


@pytest.mark.parametrize(("n_sources", "n_steps"), [(2, 1), (12, 30), (100, 12)])
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
    table = re.search(r'<h2>Events</h2>.*?<table class="text events">(.*?)</table>', page)
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


def test_more_sources_than_colours_become_rows_of_heat_maps(tmp_path):
    write_run(tmp_path / "kk", 100, 12)
    alarm = {"step": 7, "kind": "alarm", "source": "kk_logic_9", "message": "none right"}
    write_jsonl(tmp_path / "kk" / "events.jsonl", [alarm])
    run = read_run(tmp_path / "kk")
    with matplotlib.rc_context(STYLE):
        panels = {axes.get_title(loc="left"): axes for axes in draw_figure(run).axes}
    for title, key in (("Source weights", "weight"), ("Prompts drawn", "n_prompts")):
        (image,) = panels[title].get_images()
        shown = np.ma.filled(image.get_array(), 0.0)
        expected = np.array([run.series(f"curriculum/{source}/{key}") for source in run.sources])
        np.testing.assert_array_equal(shown, expected)
    (mark,) = panels["Source weights"].get_lines()
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([7], [run.sources.index("kk_logic_9")])
    names = [label.get_text() for label in panels["Source weights"].get_yticklabels()]
    assert names == run.sources[::3]  # as many as fit
    page = write_report(tmp_path / "kk")[0].read_text()
    assert page.count("<details>") == 100  # a completion of every source


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "events.jsonl"])
def test_a_file_cut_at_any_byte_still_gives_its_report(tmp_path, name):
    """As a killed run, a full disk or a crashed machine leave it: every cut of the last lines."""
    write_run(tmp_path, 2, 4)
    write_jsonl(
        tmp_path / "events.jsonl", [{"step": s, "kind": "notice", "source": None, "message": "é"} for s in (1, 2)]
    )
    whole = read_run(tmp_path)
    path, text = tmp_path / name, (tmp_path / name).read_bytes()
    start = text.rindex(b"\n", 0, -1) + 1 if text.count(b"\n") > 1 else 0
    for end in range(start, len(text) + 1, 7):
        path.write_bytes(text[:end])
        run = read_run(tmp_path)
        assert run.cut == ([] if end in (start, len(text)) else [name])
        assert len(run.steps) == 4 - (name == "metrics.jsonl" and end < len(text))
    path.write_bytes(text[: start + 9] + bytes(512))  # blocks that were never written
    assert read_run(tmp_path).cut == [name]
    assert f"The last line of {name} is cut short" in write_report(tmp_path)[0].read_text()
    path.write_bytes(text)
    assert read_run(tmp_path) == whole


def test_a_broken_line_inside_a_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        read_run(tmp_path)


def test_settings_that_differ_from_the_defaults_are_listed_without_secrets(tmp_path):
    write_run(tmp_path, 2, 3)
    assert "Settings" not in write_report(tmp_path)[0].read_text()
    (tmp_path / "config.yaml").write_text(
        "trainer: {grpo: {max_steps: 7, samples_per_prompt: 8, curriculum: {sources: {name: sec, alpha: 0.3}}}}\n"
        "model: {optim: {lr: 1e-6}, seed: 1234}\n"
        "exp_manager: {explicit_log_dir: results/<a>, wandb_logger_kwargs: {settings: {api_key: s3cr3t}}}\n"
    )
    page = write_report(tmp_path)[0].read_text()
    section = page.split("Settings that differ")[1].split("<h2>")[0]
    assert [re.findall(r"<td>(.*?)</td>", row) for row in section.split("<tr>")[2:]] == [
        ["exp_manager.explicit_log_dir", "&quot;results/&lt;a&gt;&quot;", "to be set"],
        ["exp_manager.wandb_logger_kwargs.settings.api_key", "***", "–"],
        ["trainer.grpo.curriculum.sources.alpha", "0.3", "–"],
        ["trainer.grpo.curriculum.sources.name", "&quot;sec&quot;", "&quot;dump_ucb&quot;"],
        ["trainer.grpo.max_steps", "7", "100"],
    ]
    assert "s3cr3t" not in page and "3 steps (1 to 3 of 7)" in page
    (tmp_path / "config.yaml").write_text("trainer: {grpo: {max")  # cut short
    assert "Settings" not in write_report(tmp_path)[0].read_text()


def test_the_defaults_are_those_of_the_yaml():
    """gpt_grpo.yaml, read by itself, differs in nothing but what it leaves to be set."""
    text = (Path(__file__).parents[2] / "examples/conf/gpt_grpo.yaml").read_text()
    base = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(base, dict)
    assert [key for key, value, _ in changes(flatten(base)) if value != '"???"'] == []


def test_long_completions_are_clipped_and_the_latest_come_first(tmp_path):
    write_run(tmp_path, 2, 3)
    rows = [{"step": s, "source": "kk_logic_2", **SAMPLE, "reason": "right"} for s in range(1, 9)]
    rows.append({**rows[-1], "step": 9, "completion": "x" * 20_000, "correct": False, "reason": "no <answer>"})
    write_jsonl(tmp_path / "samples.jsonl", rows)
    page = write_report(tmp_path)[0].read_text()
    heads = re.findall(r"<summary>(.*?)</summary>", page)
    assert [int(re.findall(r"step (\d+)", head)[0]) for head in heads] == [9, 8, 7, 6]
    assert "(no &lt;answer&gt;)" in heads[0] and "(right)" not in heads[1]
    assert "x" * 8001 not in page and "12,000 more characters" in page


@pytest.mark.parametrize("until", ["max_steps: 3", "max_steps: 1000, max_generated_tokens: 57600"])
def test_watching_a_run_until_its_last_step(tmp_path, until):
    """The page refreshes itself while the run goes on, and no more when it is done: 19,200 tokens a step."""
    write_run(tmp_path / "whole", 2, 3)
    (tmp_path / "kk").mkdir()
    (tmp_path / "kk/config.yaml").write_text(f"trainer: {{grpo: {{{until}}}}}")
    *rows, last = (tmp_path / "whole/metrics.jsonl").read_text().splitlines(keepends=True)
    command = [sys.executable, "-m", "megatron_dump.report", "kk", "--watch", "0.2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "watching kk" in process.stdout.readline()  # there is no step yet
            (tmp_path / "kk/metrics.jsonl").write_text("".join(rows) + last[:20])
            assert process.stdout.readline() == "open kk/report.html\n"
            page = (tmp_path / "kk/report.html").read_text()
            assert "location.reload()" in page and "2 steps (1 to 2 of " in page
            (tmp_path / "kk/metrics.jsonl").write_text("".join([*rows, last]))
            assert process.wait(120) == 0
        finally:
            process.kill()
    page = (tmp_path / "kk/report.html").read_text()
    assert "<script>" not in page and "refresh" not in page and "3 steps (1 to 3 of " in page
    assert sorted(path.name for path in (tmp_path / "kk").iterdir() if path.name.startswith(".")) == []


def test_errors_are_one_clear_line(tmp_path):
    command = [sys.executable, "-m", "megatron_dump.report", str(tmp_path)]
    missing = subprocess.run(command, check=False, capture_output=True, text=True)
    assert missing.returncode == 1
    assert "metrics.jsonl" in missing.stderr and "Traceback" not in missing.stderr
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/a/accuracy": 0.5}\n')
    with pytest.raises(ValueError, match="no training step"):
        write_report(tmp_path)
