"""A curriculum in somebody else's loop, without the somebody."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_dump.grpo import group_advantages as torch_advantages
from megatron_dump.integrations import hosted
from megatron_dump.integrations.columns import fingerprint_of, sources_of
from megatron_dump.integrations.hosted import HostedCurriculum
from megatron_dump.integrations.probe import require_signatures
from megatron_dump.integrations.verl import CurriculumSampler, check_config

P, G = 6, 4
BLOCK = {"sources": {"name": "dump_ucb", "window": 32, "temperature": 0.2}}
ROWS = ["hard", "easy", "easy"] * 8


def make(block=BLOCK, rows=ROWS, **options):
    return HostedCurriculum(block, rows, P, G, 5, "data 1", **options)


def rewards_of(draw):
    """Scripted: what a row's G rollouts earn. [P, G]"""
    return np.array([[(row * 3 + g * (row % 3)) % 4 / 3 for g in range(G)] for row in draw.prompt_ids.tolist()])


def run(curriculum, steps):
    rows = []
    for _ in range(steps):
        draw = curriculum.next_draw()
        rows.append(draw.prompt_ids.tolist())
        curriculum.learn(rewards_of(draw))
    return rows


def test_a_state_through_json_continues_with_the_same_draws():
    whole = run(make(), 9)
    first = make()
    head = run(first, 4)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + run(second, 5) == whole


def test_a_draw_without_feedback_is_made_again_after_a_resume_and_only_then():
    first = make()
    run(first, 2)
    drawn = first.next_draw()
    with pytest.raises(RuntimeError, match="before the outcomes of step 2"):
        first.next_draw()
    second = make()
    second.load_state_dict(first.state_dict())
    assert second.next_draw().prompt_ids.tolist() == drawn.prompt_ids.tolist()
    with pytest.raises(RuntimeError, match="before the outcomes of step 2"):
        second.next_draw()
    second.learn(rewards_of(drawn))
    assert second.next_draw().step == 3


def test_processes_that_learn_the_same_draw_the_same():
    one, two = make(), make()
    assert run(one, 5) == run(two, 5)
    assert one.curriculum.digest() == two.curriculum.digest()


def test_outcomes_without_the_hosts_advantages_are_the_trainers_own():
    curriculum = make({**BLOCK, "budget": {"name": "neyman"}}, fixed_groups=False)
    events = []
    curriculum.curriculum.on_event = events.append
    draw = curriculum.next_draw()
    rewards = np.random.default_rng(0).normal(size=P * G)
    curriculum.learn(rewards)
    groups = torch.from_numpy(np.repeat(np.arange(P), draw.rollouts))
    expected = torch_advantages(torch.from_numpy(rewards), groups)
    assert events[-1]["outcomes"]["advantages"] == pytest.approx(expected.tolist(), abs=1e-12)


def test_lost_rollouts_are_nobodys_baseline():
    curriculum = make()
    draw = curriculum.next_draw()
    rewards = rewards_of(draw)
    rewards[:, 1] = np.nan
    outcomes = hosted.outcomes_of(draw, rewards, correct_reward=1.0)
    three = torch.from_numpy(np.delete(rewards, 1, axis=1).reshape(-1))
    expected = torch_advantages(three, torch.arange(P).repeat_interleave(G - 1)).reshape(P, G - 1)
    advantages = outcomes.advantages.reshape(P, G)
    assert np.isnan(advantages[:, 1]).all() and not outcomes.kept.reshape(P, G)[:, 1].any()
    np.testing.assert_allclose(np.delete(advantages, 1, axis=1), expected, atol=1e-12)
    assert outcomes.correct.tolist() == (rewards.reshape(-1) >= 1.0).tolist()
    curriculum.learn(rewards)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "here.curriculum.sources: None must be a block with a name"),
        ({**BLOCK, "bugdet": {"name": "fixed"}}, "here.curriculum.bugdet: no such key; did you mean budget?"),
        ({**BLOCK, "budget": {"name": "neyman"}}, "here.curriculum.budget.name: 'neyman', but this trainer rolls"),
        ({**BLOCK, "filter": {"name": "zero_variance"}}, "here.curriculum.filter.name: 'zero_variance', but the"),
        ({**BLOCK, "prompts": {"name": "cures", "subsets": 2, "pre_rollouts": 4}}, "here.curriculum.prompts.pre_roll"),
        ({"sources": {"name": "dump_ucb", "windw": 3}}, "here.curriculum.sources.windw: no such option"),
        ({**BLOCK, "correct_reward": "high"}, "here.curriculum.correct_reward: 'high' must be a number"),
        ({**BLOCK, "resume_changed": "maybe"}, "here.curriculum.resume_changed: 'maybe' must be refuse or allow"),
    ],
)
def test_a_block_that_cannot_be_used_is_refused_by_the_hosts_key(block, message):
    with pytest.raises(ValueError) as caught:
        make(block, key="here.curriculum")
    assert str(caught.value).startswith(message)


def test_other_data_are_refused_and_with_allow_what_fits_is_kept(capsys):
    first = make()
    run(first, 3)
    other = ["hard", "easy", "new"] * 8
    with pytest.raises(ValueError, match="curriculum source names differs.*output folder.*curriculum.resume_changed"):
        make(rows=other).load_state_dict(first.state_dict())
    kept = make({**BLOCK, "resume_changed": "allow"}, other)
    kept.load_state_dict(first.state_dict())
    assert kept.step == 3 and "source names was" in capsys.readouterr().out


def test_feedback_that_does_not_fit_is_refused():
    curriculum = make()
    with pytest.raises(RuntimeError, match="nothing has been drawn"):
        curriculum.learn(np.zeros(P * G))
    draw = curriculum.next_draw()
    with pytest.raises(ValueError, match="rewards of step 0: 3 values for 24 rollouts"):
        curriculum.learn(np.zeros(3))
    curriculum.learn(rewards_of(draw))


class Table:
    """The three members of datasets.Dataset that are used."""

    def __init__(self, columns):
        self._columns, self.column_names = columns, list(columns)

    def select_columns(self, names):
        return Table({name: self._columns[name] for name in names})

    def iter(self, size):
        for i in range(0, len(next(iter(self._columns.values()))), size):
            yield {name: values[i : i + size] for name, values in self._columns.items()}


def test_sources_and_fingerprint_of_a_table():
    prompts = [[{"role": "user", "content": f"{i}"}] for i in range(10000)]
    table = Table({"prompt": prompts, "topic": [i % 3 for i in range(10000)]})
    assert sources_of(table, "topic", "key")[:4] == ["0", "1", "2", "0"]
    other = Table({"prompt": [*prompts[:-1], [{"role": "user", "content": "x"}]], "topic": table._columns["topic"]})
    same = Table({"topic": table._columns["topic"], "prompt": list(prompts)})
    of = [fingerprint_of(t, ["prompt", "topic"]) for t in (table, other, same)]
    assert of[0] == of[2] != of[1]
    with pytest.raises(ValueError, match="key: row 5000 has no topic"):
        sources_of(Table({"topic": ["a"] * 5000 + [None]}), "topic", "key")
    with pytest.raises(ValueError, match="key: the data has no column 'source'; it has prompt, topic"):
        sources_of(table, "source", "key")


def test_signatures_that_differ_are_named():
    def takes(self, batch, metrics=None): ...

    require_signatures("numpy", {"T.f": takes}, {"T.f": "batch metrics"})
    with pytest.raises(RuntimeError) as caught:
        require_signatures("numpy", {"T.f": takes, "T.g": None}, {"T.f": "batch", "T.g": ""})
    differs = "T.f takes (batch, metrics), expected (batch); T.g is missing"
    assert str(caught.value) == f"numpy {np.__version__} differs from what the curriculum knows: {differs}"


def test_a_sampler_yields_epochs_of_whole_steps_and_never_reads_ahead():
    sampler = CurriculumSampler(make(), steps_per_epoch=len(ROWS) // P)
    assert len(sampler) == 24
    rows = []
    iterator = iter(sampler)
    for step in range(4):
        batch = [next(iterator) for _ in range(P)]
        rows += batch
        names = [f"{step}:{row}" for row in batch]
        assert sampler.label(names[:2]) + sampler.label(names[2:]) == [G] * P
        order = np.random.default_rng(step).permutation(P * G)  # rollouts come back in any order
        labels = np.repeat(names, G)[order]
        samples, values = np.tile(np.arange(G), P)[order], rewards_of(sampler.curriculum.last).reshape(-1)[order]
        ones = np.ones(P * G)
        with pytest.raises(ValueError, match="feedback on 1 groups is not on the 6 that are out"):
            sampler.learn(["else"], [0], ones[:1], ones[:1], ones[:1], ones[:1])
        sampler.learn(labels, samples, values, values * 2, ones, ones)
    assert list(iterator) == []
    assert next(iter(sampler)) in range(24)
    with pytest.raises(RuntimeError, match="before the outcomes of step 4"):
        list(iter(sampler))


def test_settings_of_verl_that_read_ahead_are_refused():
    config = {"data": {"dataloader_num_workers": 8}}
    with pytest.raises(ValueError, match="data.dataloader_num_workers=8: loader processes read ahead.*set it to 0"):
        check_config(_Attributes(config))
    config = {"data": {"dataloader_num_workers": 0}, "trainer": {"v1": {"sync": {"parameter_sync_step": 2}}}}
    with pytest.raises(ValueError, match="parameter_sync_step=2"):
        check_config(_Attributes(config))
    with pytest.raises(ValueError, match="data.curriculum: missing"):
        check_config(_Attributes({"data": {"dataloader_num_workers": 0}}))


class _Attributes(dict):
    """Keys as attributes, as OmegaConf has them."""

    def __getattr__(self, name):
        return _Attributes(self[name])
