"""Policies of the user's own: found by name, checked, and saved, resumed and replayed like the built-in ones."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_dump.curriculum import Curriculum
from megatron_dump.curriculum.replay import Log, reweigh, verify
from megatron_dump.integrations.hosted import HostedCurriculum
from megatron_dump.rewards import reward_fn
from megatron_dump.rollout.engine import EngineRequest
from megatron_dump.rollout.engine_process import EngineProcess
from tests.unit.curricula import ROWS, assert_same, config, make, rejecting, run

REPO = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("own_policies.py")
MODULE = "tests.unit.own_policies"
PAGE = REPO / "docs/extending.md"


def blocks(where=MODULE, **options):
    """One of each level."""
    named = {"budget": "WrongShare", "filter": "NoneRight", "prompts": "LeastDrawn"}
    others = {section: {"name": f"{where}:{name}"} for section, name in named.items()}
    return {"sources": {"name": f"{where}:Struggling", **options}, **others}


def curriculum(where=MODULE, **options) -> Curriculum:
    return Curriculum(ROWS, 8, 4, 7, blocks(where, **options), "data", max_steps=20)


def test_a_file_and_a_module_draw_the_same(monkeypatch):
    monkeypatch.chdir(FILE.parent)
    assert_same(run(curriculum("own_policies.py"), 6, rejecting), run(curriculum(), 6, rejecting))


def test_a_resumed_run_draws_what_one_that_went_on_draws():
    whole = run(curriculum(), 9, rejecting)
    first, second = curriculum(), curriculum()
    head = run(first, 4, rejecting)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert_same(head + run(second, 5, rejecting), whole)
    assert len({n for draw in whole for n in draw.rollouts}) > 1 and len(whole) > 9  # the budget and the filter worked


def test_another_class_or_option_is_another_run():
    state = curriculum().state_dict()
    assert state["config"]["sources"] == {"name": f"{MODULE}:Struggling", "prior": 1.0}
    with pytest.raises(ValueError, match=r"curriculum sources differs: the checkpoint has .*Struggling.* 'uniform'"):
        make("uniform").load_state_dict({**state, "config": {**state["config"], "sources": {"name": "x:Struggling"}}})
    with pytest.raises(ValueError, match=r"curriculum sources differs: .*'prior': 1.0.*'prior': 2.0"):
        curriculum(prior=2.0).load_state_dict(state)


def test_a_changed_resume_keeps_the_state_by_source_name():
    first = curriculum()
    run(first, 5, rejecting)
    second = Curriculum([*ROWS, "aa", "aa"], 8, 4, 7, blocks(), "more data", max_steps=20)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), allow_changes=True)
    before, after = (made.state_dict()["parts"]["source_policy"]["counts"]["values"] for made in (first, second))
    assert before[:2] + before[2:] == after[:2] + after[4:] and after[2:4] == [0, 0]  # a, then aa, then b and c


def logged(source: Curriculum) -> Log:
    events = []
    source.on_event = events.append
    run(source, 6, rejecting)
    return Log(
        json.loads(json.dumps({"step": 0, "event": "header", **source.header()})), json.loads(json.dumps(events))
    )


def test_a_log_replays_bit_for_bit_and_other_logs_can_be_reweighed():
    log = logged(curriculum())
    assert log.policies == [f"{MODULE}:Struggling"] and verify(log) == 6
    assert not reweigh(log, {"name": f"{FILE}:Struggling"}).distance.any()
    assert reweigh(logged(make("uniform")), {"name": f"{FILE}:Struggling", "prior": 3.0}).distance.any()


def test_the_replay_tool_takes_a_file(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("replay_tool", REPO / "tools/replay.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    log = logged(make("uniform"))
    path = tmp_path / "curriculum.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [log.header, *log.events]))
    assert tool.main([str(path), "--policy", f"{FILE}:Struggling", "prior=2.0"]) == 0
    assert (tmp_path / "replay_Struggling.png").exists()
    assert tool.main([str(path), "--policy", f"{FILE}:Strugling"]) == 1
    assert (
        "has no class 'Strugling'; its classes: Struggling, LeastDrawn, WrongShare, NoneRight"
        in capsys.readouterr().err
    )


FAULTY = """
import abc
import numpy as np
from megatron_dump.curriculum.filters import Filter
from megatron_dump.curriculum.source_policy import IndependentSlots, SourcePolicy
from tests.unit.own_policies import LeastDrawn, Struggling, WrongShare

class Abstract(IndependentSlots):
    pass

class OfTheProtocol(SourcePolicy):
    def weights(self, step): ...

class Half:
    def weights(self, step): ...

class NoRefills(Filter):
    def rejected(self, outcomes): ...

class Raises(Struggling):
    def __init__(self, setting, *, size=1):
        raise KeyError(f"no {size}")

class Needs(Struggling):
    def __init__(self, setting, *, size):
        super().__init__(setting)

class Unsaved(Struggling):
    def __init__(self, setting, *, kind=int):
        super().__init__(setting)

class Text(Struggling):
    def state_dict(self):
        return {"name": np.array(["x"])}

class Whole(Struggling):
    def state_dict(self):
        return {"count": np.zeros(5)}

class Doubled(Struggling):
    def weights(self, step):
        return 2 * super().weights(step)

class Outside(Struggling):
    def slots(self, step, consumed, n, seed):
        return np.full(n, self.n_sources)

class First(LeastDrawn):
    def draw(self, step, first_group, source_ids, exclude):
        return np.zeros(len(source_ids), np.int64)

class Less(WrongShare):
    def allot(self, pass_rates, total):
        return super().allot(pass_rates, total) - 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "needy.py").write_text("import not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("section", "block", "message"),
    [
        ("sources", "nope.py:X", "name: 'nope.py:X' cannot be imported: FileNotFoundError: .*nope.py'; check the path"),
        (
            "sources",
            "no.pe:X",
            "name: 'no.pe:X' cannot be imported: ModuleNotFoundError: .*; check the name and PYTHONPATH",
        ),
        ("budget", ":X", "name: ':X' cannot be imported: ValueError: Empty module name"),
        ("prompts", "broken.py:X", "name: 'broken.py:X' cannot be imported: SyntaxError: "),
        ("filter", "needy.py:X", "name: 'needy.py:X' cannot be imported: ModuleNotFoundError: .*'not_there'"),
        ("filter", "needy:X", "name: 'needy:X' cannot be imported: ModuleNotFoundError: .*'not_there'"),
        (
            "sources",
            "faulty.py:X",
            "name: 'faulty.py:X': faulty.py has no class 'X'; its classes: Abstract, OfTheProtocol",
        ),
        ("sources", "faulty:np", "name: 'faulty:np': faulty has no class 'np'"),
        (
            "sources",
            "faulty.py:Abstract",
            "name: 'faulty.py:Abstract' lacks weights; give .* SourcePolicy in megatron_dump/curr",
        ),
        (
            "sources",
            "faulty.py:OfTheProtocol",
            "lacks slots, drawn, observe, state_dict, load_state_dict, metrics; give",
        ),
        (
            "prompts",
            "faulty.py:Half",
            "lacks uses_pass_rates, draw, available, pre_rollouts, prepared, state_dict, load_st",
        ),
        ("budget", "faulty.py:Half", "lacks uses_pass_rates, allot; .* Budget in megatron_dump/curriculum/budget.py"),
        ("filter", "faulty.py:NoRefills", "lacks max_refills; .* Filter in megatron_dump/curriculum/filters.py"),
        (
            "sources",
            "faulty.py:Raises",
            r"name: 'faulty.py:Raises' cannot be made: KeyError: 'no 1'; mend the class or its",
        ),
        ("sources", "faulty.py:Needs", "size: no value, and faulty.py:Needs has no default: set it"),
        (
            "sources",
            "faulty.py:Unsaved",
            "kind: <class 'int'> cannot be saved: give numbers, text, lists or blocks",
        ),
        ("sources", "faulty.py:Text", "name: 'faulty.py:Text': state_dict has 'name' of dtype <U1, which is not saved"),
        (
            "sources",
            "faulty.py:Whole",
            r"name: 'faulty.py:Whole': state_dict has 'count' of shape \[5\]; make it a row for",
        ),
        (
            "sources",
            {"name": f"{MODULE}:Struggling", "piror": 2},
            r"piror: no such option \(value 2\); options of .*: prior \(the keyword-only parameters of its const",
        ),
        (
            "sources",
            {"name": f"{MODULE}:Struggling", "prior": "much"},
            r"cannot be made: ValueError: trainer.grpo.curriculum.sources.prior: 'much' must be a number >= 1e-06",
        ),
        (
            "sources",
            "strugling",
            "known: .*, uniform, or a class of your own: package.module:Class or path/to/file.py:Class",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(folder, section, block, message):
    wrong = {**config(), section: block if isinstance(block, dict) else {"name": block}}
    with pytest.raises(ValueError, match=rf"^trainer\.grpo\.curriculum\.{section}\..*{message}") as caught:
        Curriculum(ROWS, 8, 4, 7, wrong, "data", max_steps=20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "name", "message"),
    [
        ("sources", "Doubled", r"Doubled.weights returned float64 \[3\]: .*; it must return float64 \[3\], finite, at"),
        (
            "sources",
            "Outside",
            r"Outside.slots returned int64 \[8\]: .*; it must return int64 \[8\], sources in 0 .. 2",
        ),
        ("prompts", "First", r"First.draw returned int64 \[8\]: .*; it must return int64 \[8\], rows of the sources"),
        ("budget", "Less", r"Less.allot returned int64 \[8\]: .*; it must return int64 \[8\], at least 1, of sum 32"),
    ],
)
def test_a_wrong_answer_is_not_trained_on(folder, section, name, message):
    wrong = Curriculum(ROWS, 8, 4, 7, {**config(), section: {"name": f"faulty.py:{name}"}}, "data")
    with pytest.raises(ValueError, match=rf"trainer.grpo.curriculum.{section}.name: {message}"):
        wrong.draw(0)


# --------------------------------------------------------------------------------------------------- in any host's loop
def hosted(name, key="curriculum", **blocks):
    rows = ["hard", "easy", "easy"] * 8
    return HostedCurriculum({"sources": {"name": name}, **blocks}, rows, 6, 4, 5, "data 1", key=key)


def steps(curriculum, n):
    drawn = []
    for _ in range(n):
        draw = curriculum.next_draw()
        drawn.append(draw.prompt_ids.tolist())
        curriculum.learn(np.repeat(draw.prompt_ids % 3 == 0, 4).astype(float))
    return drawn


def test_a_hosts_loop_continues_with_the_same_draws():
    whole, first, second = (hosted(f"{FILE}:Struggling") for _ in range(3))
    expected = steps(whole, 9)
    head = steps(first, 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + steps(second, 5) == expected
    assert whole.next_draw().weights.argmin() == whole.sources.index("hard")  # rows 0, 3, …, which are right
    with pytest.raises(ValueError, match="^here.sources.name: 'x.py:X' cannot be imported"):
        hosted("x.py:X", key="here")


def test_own_prompts_may_not_ask_a_host_for_pre_rollouts(tmp_path):
    (tmp_path / "asks.py").write_text(
        "from tests.unit.own_policies import LeastDrawn\n"
        "class Asks(LeastDrawn):\n"
        "    def pre_rollouts(self, step):\n"
        "        return self.rows.rows(0)[:2], 4\n"
    )
    with pytest.raises(ValueError, match="here.prompts: it asks for pre-rollouts"):
        hosted("uniform", key="here", prompts={"name": f"{tmp_path}/asks.py:Asks"}).next_draw()


# ------------------------------------------------------------------------------------------------------------- the page
def examples(heading: str = "Policy") -> list[str]:
    """The Python of one of the page's chapters."""
    chapters = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    return re.findall(r"```python\n(.*?)```", chapters[heading], re.DOTALL)


def test_the_pages_policies_run(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("\n\n".join(examples()))
    assert_same(run(curriculum(str(file)), 6, rejecting), run(curriculum(), 6, rejecting))
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 20 for block in examples())


def test_the_pages_reward_engine_and_loop_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page_rewards.py").write_text(examples("Reward")[0])
    judge = reward_fn("page_rewards:LastNumber", {"wrong": -0.1})
    assert [judge(text, "7").reward for text in ("3 + 4 = 7", "8", "seven")] == [1.0, -0.1, -0.1]

    (tmp_path / "page_engine.py").write_text(examples("Engine")[0])
    log = tmp_path / "engine.log"
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    engine = EngineProcess("page_engine:Echo", {}, log, env=path)
    try:
        answer = engine.generate([EngineRequest(np.array([5, 6]), (1, 2, 3))]).result(60)
    finally:
        engine.close()
    assert [output.token_ids.tolist() for output in answer[0]] == [[5, 6]] * 3

    (tmp_path / "own.py").write_text("\n\n".join(examples()))
    given = {"sources": ["a", "b"] * 12, "rollouts_and_update": lambda rows: np.repeat(rows % 2, 4).reshape(6, 4)}
    exec(examples("Host integration")[0], given)
    assert given["curriculum"].step == 20 and given["draw"].weights[0] > 0.9  # rows of `a` are never right


def test_numpy_is_all_that_a_host_needs(tmp_path):
    """An interpreter that finds the standard library, numpy and this package, and nothing else."""
    for name in ("numpy", "numpy.libs"):
        if (found := Path(np.__file__).parents[1] / name).exists():
            (tmp_path / name).symlink_to(found)
    (tmp_path / "megatron_dump").symlink_to(REPO / "megatron_dump")
    (tmp_path / "own.py").write_text("\n\n".join(examples()))
    (tmp_path / "drive.py").write_text(
        "import sys\n"
        "from megatron_dump.integrations.hosted import HostedCurriculum\n"
        "block = {'sources': {'name': 'own.py:Struggling'}}\n"
        "curriculum = HostedCurriculum(block, ['a', 'b', 'b'] * 8, 6, 4, 5, 'data')\n"
        "for _ in range(20):\n"
        "    draw = curriculum.next_draw()\n"
        "    curriculum.learn(draw.source_ids.repeat(4) == 0)\n"
        "assert draw.weights[1] > 0.9, draw.weights\n"
        "assert not {'torch', 'omegaconf', 'yaml', 'megatron'} & set(sys.modules)\n"
    )
    bare = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "drive.py"]  # -S: no site-packages
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
