"""tools/benchmark_multinode.py: fits, costs of collectives, constants, layouts and efficiencies."""

from __future__ import annotations

import itertools
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "tools"))

from multinode_bench import steps
from multinode_bench.constants import read_constants, save_constants
from multinode_bench.fit import alpha_beta, fit
from multinode_bench.network import Link, Network, Span, span
from multinode_bench.scaling import arguments_of, efficiencies, parse_layout
from multinode_bench.steps import Measured
from multinode_bench.workload import Lengths

REPO = pathlib.Path(__file__).resolve().parents[2]
KK_TINY = REPO / "examples/models/kk-tiny"
H100 = REPO / "tools/multinode_bench/h100_sxm.json"
LENGTHS = Lengths(40.0, 30.0, 90.0)


@given(alpha=st.floats(1e-6, 1e-2), beta=st.floats(1e-12, 1e-7))
def test_alpha_and_beta_are_found_again(alpha, beta):
    sizes = [2.0**n for n in range(10, 29, 2)]
    found = alpha_beta(sizes, [alpha + beta * size for size in sizes])
    assert found.coefficients == pytest.approx((alpha, beta), rel=1e-6)
    assert found.error < 1e-9


def test_noise_of_a_few_percent_leaves_alpha_and_beta_within_a_few_percent():
    rng = np.random.default_rng(0)
    sizes = np.array([2.0**n for n in range(10, 29, 2)] * 9)
    found = alpha_beta(sizes, (1e-4 + 1e-9 * sizes) * rng.normal(1, 0.05, len(sizes)))
    assert found.coefficients == pytest.approx((1e-4, 1e-9), rel=0.05)
    assert found.error == pytest.approx(0.05, rel=0.2)


def test_no_latency_is_negative():
    """The line through these points meets the axis below zero."""
    found = alpha_beta([1.0, 2.0, 3.0], [1.0, 3.0, 5.0])
    assert found.coefficients[0] == 0.0
    # One coefficient: b = sum(x / y) / sum(x² / y²) minimises sum((b x / y - 1)²).
    ratios = np.array([1.0, 2 / 3, 3 / 5])
    assert found.coefficients[1] == pytest.approx(ratios.sum() / (ratios**2).sum())


def test_a_fit_needs_as_many_measurements_as_coefficients():
    with pytest.raises(ValueError, match="a fit of 2 coefficients to 1 measurements"):
        fit([(1.0, 2.0)], [1.0])


# ---- collectives
def test_groups_lie_on_nodes_as_megatron_places_them():
    """Against an enumeration of the ranks of a group."""
    for stride, ranks, per_node in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        nodes = {i * stride // per_node for i in range(ranks)}
        assert span(stride, ranks, per_node).nodes == len(nodes), (stride, ranks, per_node)


def test_an_all_reduce_over_nodes_costs_what_its_parts_do():
    network = Network(Link(1.0, 10.0), Link(100.0, 1000.0), Link(1.0, 1.0), None)
    assert network.all_reduce(1.0, Span(1, 1)) == 0.0
    assert network.all_reduce(1.0, Span(2, 2)) == 2 * 1 + 1 * 10  # there and back; each sends all of it once
    assert network.all_reduce(1.0, Span(4, 4)) == 4 * 1 + 1.5 * 10
    assert network.all_reduce(1.0, Span(4, 2)) == (2 * 1 + 10) + (2 * 100 + 0.5 * 1000)  # half of it between nodes
    with pytest.raises(ValueError, match=r"links\.inter"):
        network.send(1.0, Span(2, 1))


def test_constants_survive_a_file_and_wrong_ones_are_named(tmp_path):
    constants = read_constants(H100)
    assert constants.train_flops == pytest.approx(989.4e12 * 0.4)
    assert constants.links["inter"]["all_reduce"].beta == pytest.approx(1 / 40e9)
    save_constants(constants, tmp_path / "constants.json")
    assert read_constants(tmp_path / "constants.json") == constants
    raw = json.loads(H100.read_text())
    for change, message in (
        (lambda r: r.pop("train_flops"), "lacks train_flops"),
        (lambda r: r.update(speed=1), "has unknown speed"),
        (lambda r: r.update(train_flops=0), "train_flops=0.0: must be positive"),
        (lambda r: r["links"].pop("intra"), "cannot be used"),
    ):
        broken = json.loads(json.dumps(raw))
        change(broken)
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            read_constants(tmp_path / "broken.json")


@pytest.mark.parametrize("text", ["TP2xTP2", "2x2", "TP0", "XP2", "TP2x", "", "DP-1"])
def test_no_layout(text):
    with pytest.raises(ValueError, match="--layouts"):
        parse_layout(text)


def test_layouts_become_arguments():
    layout = parse_layout("TP2xDP2")
    assert (layout.ranks, layout.keys) == (4, {"tensor_model_parallel_size": 2})
    given = ["--config-name=kk_cpu", f"pretrained_checkpoint.restore_from_path={KK_TINY}"]
    for mode, prompts in (("strong", 16), ("weak", 64)):
        config = steps.read_arguments(arguments_of(layout, mode, given))
        assert config.trainer.grpo.num_prompts_per_grpo_step == prompts
        assert (config.trainer.devices, config.model.global_batch_size) == (4, 16 * prompts)
        assert config.model.pipeline_model_parallel_size == 1


def test_efficiencies():
    def measured(name, mode, ranks, prompts, seconds):
        return Measured(name, mode, ["--config-name=kk_cpu"], ranks, [LENGTHS], [{"step": seconds}], prompts, [], [], 1)

    found = [
        measured("1-strong", "strong", 1, 16, 8.0),
        measured("DP2-strong", "strong", 2, 16, 5.0),
        measured("1-weak", "weak", 1, 16, 8.0),
        measured("DP2-weak", "weak", 2, 32, 10.0),
    ]
    assert [r["efficiency"] for r in efficiencies(found, "strong")] == [1.0, 0.8]
    assert [r["efficiency"] for r in efficiencies(found, "weak")] == [1.0, 0.8]
