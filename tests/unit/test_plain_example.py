"""examples/integrations/plain_pytorch.py: it learns, it follows the curriculum, and it continues."""

from __future__ import annotations

import importlib.util
import pathlib

import torch

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "integrations" / "plain_pytorch.py"


def example():
    spec = importlib.util.spec_from_file_location("plain_pytorch", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_and_continues_as_if_it_had_not_stopped(tmp_path, capsys):
    main = example().main
    whole, policy = main(["--steps", "200", "--out", str(tmp_path / "whole")])
    shown = [float(line.split("reward ")[1].split(";")[0]) for line in capsys.readouterr().out.splitlines()]
    assert shown[-1] > 0.15  # chance is 1/48
    main(["--steps", "70", "--out", str(tmp_path / "part")])
    rest, continued = main(["--steps", "200", "--out", str(tmp_path / "part")])
    assert rest.curriculum.digest() == whole.curriculum.digest()
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), continued.parameters()))
