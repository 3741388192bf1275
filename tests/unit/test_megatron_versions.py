"""What is done about versions of megatron-core; tests/versions compares whole runs."""

from __future__ import annotations

import ast
import pathlib
import warnings

import pytest

from megatron_dump.actor import megatron_versions as versions

PACKAGE = pathlib.Path(versions.__file__).parents[1]


@pytest.mark.parametrize("version", [(0, 16), (0, 17), (0, 18), (0, 19)])
def test_what_was_tried_is_taken_in_silence(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check(version)


def test_an_older_one_is_refused_by_name_with_the_remedy():
    with pytest.raises(ImportError, match=r"megatron-core 0\.15 is too old: pip install 'megatron-core>=0\.16'"):
        versions.check((0, 15))


def test_a_newer_one_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            versions.check((1, 0))
        versions.check((1, 0), warn=False)
    assert len(caught) == 1
    assert "megatron-core 1.0 is newer than what megatron_dump was run with (0.16 to 0.19)" in str(caught[0].message)
    assert "pip install 'megatron-core==0.19.*'" in str(caught[0].message)


def test_nothing_else_asks_for_a_version():
    asking = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or "", *(a.name for a in node.names)] if isinstance(node, ast.ImportFrom) else []
            attribute = node.attr if isinstance(node, ast.Attribute) else ""
            if any("package_info" in name for name in names) or attribute == "getsource":
                asking.append(path.name)
    assert set(asking) == {"megatron_versions.py"}
