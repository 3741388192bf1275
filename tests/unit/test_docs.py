"""README and docs/: links lead to files, and README's own reward is one that a run takes."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest
import yaml

from megatron_dump.rewards import reward_functions

REPO = pathlib.Path(__file__).parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_to_files(page):
    targets = [target for target, _ in LINK.findall(page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_index_has_every_page():
    linked = {target for target, _ in LINK.findall((REPO / "docs/README.md").read_text())}
    pages = {page.relative_to(REPO / "docs").as_posix() for page in (REPO / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith("results/")} - linked == {"README.md"}


def test_readmes_reward_is_taken(tmp_path, monkeypatch):
    text = (REPO / "README.md").read_text()
    (code,), (block, *_) = (re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("python", "yaml"))
    (tmp_path / "rewards_of_mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    mapping = yaml.safe_load(block)["model"]["data"]["rewards"]
    function = reward_functions(mapping, ["my_words"])["my_words"]
    assert function("it is blue", "blue").reward == 1.0 and function("", "blue") == type(function("", "blue"))(
        reward=0.0, correct=False, well_formed=False
    )
    sys.modules.pop("rewards_of_mine")
