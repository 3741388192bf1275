"""What is done about versions of megatron-core; tests/versions compares whole runs."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import warnings

import megatron.core
import pytest

from megatron_dump.actor import megatron_versions as versions

PACKAGE = pathlib.Path(versions.__file__).parents[1]


@pytest.mark.parametrize("version", [(0, 16), (0, 17), (0, 18), (0, 19)])
def test_what_was_tried_is_taken_in_silence(version):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.refuse_older(version)
        versions.warn_of_newer(version)
    assert caught == []


def test_the_version_is_the_installed_ones():
    assert versions.installed() == tuple(map(int, megatron.core.__version__.split(".")[:2]))


def test_an_older_one_is_refused_by_name_before_anything_imports_it(tmp_path):
    """An old version's own modules may not even import beside a new torch."""
    core = tmp_path / "megatron/core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('imported')")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 15\nPATCH = 3\n")
    settings = ["pretrained_checkpoint.restore_from_path=x", f"exp_manager.explicit_log_dir={tmp_path}/log"]
    done = subprocess.run(
        [sys.executable, "examples/train_gpt_grpo.py", "--config-name=kk_cpu", *settings],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    line = "[rank 0] error: megatron-core 0.15 is too old: pip install 'megatron-core>=0.16'"
    assert done.stderr.strip().splitlines()[-1] == line and "Traceback" not in done.stderr


def test_a_newer_one_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            versions.warn_of_newer((1, 0))
    assert len(caught) == 1
    assert "megatron-core 1.0 is newer than what megatron_dump was run with (0.16 to 0.19)" in str(caught[0].message)
    assert "pip install 'megatron-core==0.19.*'" in str(caught[0].message)


def test_nothing_else_asks_for_a_version():
    asking = re.compile(
        r"""core\.package_info|"package_info\.py"|core\.__version__|getsource|megatron_versions\.VERSION"""
    )
    assert [p.name for p in PACKAGE.rglob("*.py") if asking.search(p.read_text())] == ["megatron_versions.py"]
