"""tools/compare_runs.py: groups by settings, bands and tables against independent computations."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from run_comparison.curves import TEST, at_tokens, common_tokens, over_steps, over_tokens  # noqa: E402
from run_comparison.groups import read_groups  # noqa: E402
from run_comparison.intervals import difference, over_seeds, t_cdf, t_quantile  # noqa: E402
from run_comparison.tables import between_groups, by_group, by_source  # noqa: E402

from tests.unit.recorded_runs import write_jsonl, write_run  # noqa: E402


def write_config(log_dir: Path, seed: int, policy: str, devices: int = 1) -> None:
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / "config.yaml").write_text(
        f"trainer: {{devices: {devices}, grpo: {{curriculum: {{sources: {{name: {policy}}}}}}}}}\n"
        f"model: {{seed: {seed}}}\nexp_manager: {{explicit_log_dir: {log_dir}}}\n"
    )


def write_grid(folder: Path, seeds: int = 3, sources: int = 3) -> list[Path]:
    """Two policies, the second better and cheaper."""
    runs = []
    for policy, gain, tokens in (("uniform", 3.0, 20_000.0), ("sec", 5.0, 16_000.0)):
        for seed in range(seeds):
            runs.append(folder / f"{policy}-{seed}")
            write_run(runs[-1], sources, 20, seed, gain, tokens)
            write_config(runs[-1], seed, policy, devices=1 + seed)
    return runs


def write_curve(folder: Path, accuracies: list[float], tokens: float) -> Path:
    """A run of one source, with a validation after every step."""
    rows: list[dict] = [{"step": 0, "val/a/accuracy": accuracies[0]}]
    for step, accuracy in enumerate(accuracies[1:], start=1):
        rows.append({"step": step, "critic/score/mean": accuracy, "perf/generated_tokens": tokens})
        rows.append({"step": step, "val/a/accuracy": accuracy})
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


@pytest.mark.parametrize(
    ("dof", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (9, 2.2622), (30, 2.0423)]
)
def test_students_t_against_the_published_table(dof, t):
    assert t_quantile(0.975, dof) == pytest.approx(t, abs=5e-5)
    density = math.gamma((dof + 1) / 2) / math.sqrt(dof * math.pi) / math.gamma(dof / 2)
    x = np.linspace(0, 1.3, 20_001)
    y = density * (1 + x**2 / dof) ** (-(dof + 1) / 2)
    area = float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())  # the integral itself
    assert t_cdf(1.3, dof) == pytest.approx(0.5 + area, abs=1e-8)
    assert t_cdf(-1.3, dof) == pytest.approx(0.5 - area, abs=1e-8)


def test_intervals_cover_the_mean_as_often_as_they_say():
    """Of 2,000 draws of 3 and of 5 seeds, and of the difference of unlike groups, 95 % within sampling error."""
    rng = np.random.default_rng(0)
    for n in (3, 5):
        hits = [abs((i := over_seeds(rng.normal(2.0, 0.5, n))).mean - 2.0) <= i.half for _ in range(2000)]
        assert 0.935 <= np.mean(hits) <= 0.965
    welch, paired = [], []
    for _ in range(2000):
        a, b, shared = rng.normal(0, 1, 4), rng.normal(1, 3, 6), rng.normal(0, 5, 4)
        found, is_paired = difference(dict(enumerate(a)), dict(enumerate(b)))
        welch.append(not is_paired and abs(found.mean - 1) <= found.half)
        found, is_paired = difference(dict(enumerate(a + shared)), dict(enumerate(rng.normal(1, 1, 4) + shared)))
        paired.append(is_paired and abs(found.mean - 1) <= found.half)
    assert 0.935 <= np.mean(welch) <= 0.975 and 0.935 <= np.mean(paired) <= 0.965


def test_groups_are_runs_that_differ_in_the_seed_alone(tmp_path):
    runs = write_grid(tmp_path)  # on other numbers of ranks, too
    groups = read_groups(runs, [])
    assert [(g.label, [s.seed for s in g.seeds]) for g in groups] == [
        ("sources.name=uniform", [0, 1, 2]),
        ("sources.name=sec", [0, 1, 2]),
    ]
    named = read_groups(runs[3:4], [("all uniform", runs[:2])])
    assert [(g.label, len(g.seeds)) for g in named] == [("sec-0", 1), ("all uniform", 2)]
    for run in runs:
        (run / "config.yaml").unlink()
    assert [(g.label, len(g.seeds)) for g in read_groups(runs, [])] == [("uniform", 3), ("sec", 3)]


def test_what_would_count_a_run_twice_is_refused(tmp_path):
    runs = write_grid(tmp_path, seeds=2)
    with pytest.raises(ValueError, match=r"uniform-0 is given twice"):
        read_groups([runs[0], runs[0]], [])
    write_config(runs[1], 0, "uniform")
    with pytest.raises(ValueError, match=r"uniform-0, uniform-1 have the same model\.seed=0"):
        read_groups(runs, [])
    with pytest.raises(ValueError, match="the label 'a' is there twice"):
        read_groups([], [("a", runs[:1]), ("a", runs[2:])])


def test_a_band_over_steps_and_over_tokens_by_hand(tmp_path):
    """Three seeds; the third ends earlier and generates twice the tokens a step."""
    curves = ([0.0, 0.2, 0.4, 0.6], [0.0, 0.4, 0.6, 0.8], [0.3, 0.3, 0.8])
    folders = [
        write_curve(tmp_path / f"a-{k}", c, t) for k, (c, t) in enumerate(zip(curves, (10, 10, 20), strict=True))
    ]
    (group,) = read_groups(folders, [])
    steps = over_steps(group, TEST)
    assert steps.x.tolist() == [0, 1, 2]  # where all of them are
    np.testing.assert_allclose(steps.mean, [0.1, 0.3, 0.6])
    np.testing.assert_allclose(steps.half[1], 4.302653 * 0.1 / math.sqrt(3), rtol=1e-5)  # t × deviation / √n
    tokens = over_tokens(group, TEST)
    assert (tokens.x[0], tokens.x[-1]) == (0, 30)
    expected = [(0.2 + 0.4 + 0.3) / 3, (0.6 + 0.8 + 0.55) / 3]
    np.testing.assert_allclose(np.interp([10, 30], tokens.x, tokens.mean), expected, atol=2e-3)  # a kink between points
    assert common_tokens([group], TEST) == 30
    assert at_tokens(group, TEST, 25) == pytest.approx({"a-0": 0.5, "a-1": 0.7, "a-2": 0.425})
    assert math.isnan(at_tokens(group, TEST, 35)["a-0"])  # nothing is extrapolated


def test_the_tables_say_what_equal_tokens_leave_of_a_gain(tmp_path):
    """After as many steps the second group is ahead; after as many tokens it is where the first one is."""
    slow = [write_curve(tmp_path / f"slow-{k}", [0.1, 0.2, 0.3 + k / 100], 10) for k in range(3)]
    costly = [write_curve(tmp_path / f"costly-{k}", [0.1, 0.3 + k / 100, 0.5], 20) for k in range(3)]
    groups = read_groups([], [("slow", slow), ("costly", costly)])
    columns, (first, second) = by_group(groups)
    assert columns[-1] == "at 20 tokens"
    assert first[:4] == ["slow", "3", "2", "20"] and second[:4] == ["costly", "3", "2", "40"]
    half = f"{4.302653 * 0.01 / math.sqrt(3):.3f}"
    assert first[5:] == [f"0.310 ± {half}", f"+0.210 ± {half}", f"0.310 ± {half}"]
    assert second[5:] == ["0.500 ± 0.000", "+0.400 ± 0.000", f"0.310 ± {half}"]
    _, (row,) = between_groups(groups)
    assert row[0] == "costly" and row[1].startswith("+0.190") and row[3].startswith("+0.000")
    assert row[-1] == "seeds differ: Welch"  # their folders' names are all that tells them apart
    assert by_source(groups)[1] == [["a", f"0.310 ± {half}", "0.500 ± 0.000"]]


def test_runs_without_validations_or_token_counts(tmp_path):
    for seed in range(2):
        rows = [{"step": s, "critic/score/mean": s + seed, "train/a/accuracy": 0.5} for s in range(1, 4)]
        write_jsonl(tmp_path / f"plain-{seed}" / "metrics.jsonl", rows)
    groups = read_groups(sorted(tmp_path.glob("plain-*")), [])
    columns, ((*_, last, _, equal),) = by_group(groups)
    assert columns[3:5] == ["tokens", "training reward: first"] and columns[-1] == "at unknown tokens"
    assert last.startswith("3.500 ± 6.353") and equal == "–"
    assert by_source(groups)[1] == []


def run_tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "compare_runs.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)


def test_the_tool_writes_one_self_contained_page_and_a_picture(tmp_path):
    runs = write_grid(tmp_path / "results")
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "critic/sc')  # killed
    done = run_tool(*runs, "--out", "out/compare", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"sources\.name=sec +\+0\.\d{3} ± 0\.\d{3} .*paired over seeds", done.stdout)
    page = (tmp_path / "out/compare.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import|url\(""", page)
    assert "sources.name=uniform against sources.name=sec" in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.html", "compare.png"]


def test_errors_are_one_clear_line(tmp_path):
    for arguments, message in (
        (["nowhere"], "nowhere/metrics.jsonl"),
        (["--group", "DUMP"], "--group DUMP: a label and its runs"),
    ):
        done = run_tool(*arguments, cwd=tmp_path)
        assert done.returncode == 1 and message in done.stderr
        assert len(done.stderr.splitlines()) == 1
