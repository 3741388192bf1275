"""Pages as a browser sees them: no error on the console, nothing fetched, nothing cut off."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_dump.report import write_report
from tests.unit.recorded_runs import write_jsonl, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REPO = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"),
        reason="no chromium here: apt-get install chromium, to look at the pages",
    ),
]
# Appended to the page: what it measures becomes its title. Chromium prints the page as it is then.
PROBE = """<script>addEventListener("load", () => {
const bad = [...document.images].filter(i => !i.complete || !i.naturalWidth).length
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide") &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.tagName)
document.title = JSON.stringify({bad, wide, fetched: performance.getEntriesByType("resource").filter(
  r => !r.name.startsWith("data:")).length, scrolls: document.documentElement.scrollWidth > innerWidth})
})</script>"""


def browse(page: Path, width: int) -> tuple[str, str, Path]:
    """(the document when loaded, chromium's console, a screenshot)."""
    assert CHROMIUM is not None, "CI needs a browser: make chromium"
    probed, picture = page.with_name("probed.html"), page.with_name("screen.png")
    probed.write_text(page.read_text() + PROBE)
    folder = page.with_name("profile")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}"]
    command = [CHROMIUM, *options, f"--window-size={width},3000"]
    done = subprocess.run(
        [*command, "--dump-dom", probed.as_uri()], check=True, capture_output=True, text=True, timeout=240
    )
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=240)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console, picture


def check(page: Path, width: int) -> None:
    document, console, picture = browse(page, width)
    assert console == ""
    title = re.search(r"<title>(.*?)</title>", document)
    assert title is not None
    assert title[1] == '{"bad":0,"wide":[],"fetched":0,"scrolls":false}'
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width and pixels.std() > 0.05


@pytest.mark.parametrize(("n_sources", "width"), [(12, 1200), (100, 1200), (100, 800)])
def test_a_report(tmp_path, n_sources, width):
    write_run(tmp_path, n_sources, 30)
    long_text = {"source": None, "message": "x" * 400}
    write_jsonl(tmp_path / "events.jsonl", [{"step": 3, "kind": "notice", **long_text}])
    (tmp_path / "config.yaml").write_text("model: {data: {train_files: [" + "data/a.parquet, " * 60 + "]}}")
    check(write_report(tmp_path)[0], width)


def test_a_comparison(tmp_path):
    for policy in ("uniform", "sec"):
        for seed in range(3):
            write_run(tmp_path / f"{policy}-{seed}", 12, 20, seed, 3.0 + 2 * (policy == "sec"))
    command = [sys.executable, str(REPO / "tools/compare_runs.py"), *map(str, sorted(tmp_path.glob("*-*")))]
    subprocess.run([*command, "--out", str(tmp_path / "compare")], check=True, capture_output=True)
    check(tmp_path / "compare.html", 1200)
