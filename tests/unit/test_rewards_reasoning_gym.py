"""The reward of reasoning-gym's tasks on the rows that kk.procedural writes, against the library's own verdicts."""

import contextlib
import json
import math
import sys

import pyarrow.parquet as pq
import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

from kk import procedural
from megatron_dump.data import PromptDataset
from megatron_dump.rewards import GroundTruthError, reward_fn
from megatron_dump.rewards.reasoning_gym import ReasoningGymReward
from megatron_dump.rewards.workers import Faults, Job, RewardPool

REWARD = ReasoningGymReward()
TASKS = {  # a category each
    "spell_backward": "algorithmic",
    "chain_sum": "arithmetic",
    "simple_equations": "algebra",
    "mini_sudoku": "games",
    "knights_knaves": "logic",
    "number_sequence": "cognition",
    "shortest_path": "graphs",
    "simple_geometry": "geometry",
    "list_functions": "induction",
    "bf": "code",
    "arc_1d": "arc",
}


def tagged(answer):
    return f"<think>so</think>\n<answer>{answer}</answer>"


def judge(answer, truth, reward=REWARD):
    return reward(tagged(answer), truth)


def truth_of(task, seed=3, index=0, **config):
    """(ground truth, entry, the library's judge)."""
    judge = reasoning_gym.create_dataset(task, seed=seed, size=index + 1, **config)
    entry = judge[index]
    return json.dumps({"task": task, "config": config, "entry": entry}), entry, judge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("gym")
    assert procedural.main(["--task", *TASKS, "--train", "6", "--test", "1", "--seed", "4", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def rows(folder):
    """(source, right answer, ground truth as the trainer reads it) of every training row."""
    data = PromptDataset(str(folder / "train.parquet"), encode=lambda messages: [len(messages)])
    table = pq.read_table(folder / "train.parquet").to_pylist()
    assert {row["data_source"]: row["ability"] for row in table} == {f"rg_{t}": c for t, c in TASKS.items()}
    return [(data[i].source, row["extra_info"]["answer"], data[i].ground_truth) for i, row in enumerate(table)]


@pytest.mark.parametrize("task", TASKS)
def test_the_librarys_own_answer_is_right_and_another_rows_is_not(rows, task):
    ours = [(answer, truth) for source, answer, truth in rows if source == f"rg_{task}"]
    assert len(ours) == 6
    different = 0
    for answer, truth in ours:
        for _ in range(2):  # scorers may change the entry
            score = judge(f"\n{answer}\n", truth)
            assert (score.reward, score.correct, score.well_formed, score.reason) == (3.0, True, True, "right")
            assert score.components == {"format": 1.0, "answer": 2.0, "accuracy": 1.0, "score": 1.0}
        made = json.loads(truth)
        scorer = reasoning_gym.create_dataset(task, **made["config"])
        for other in {other for other, _ in ours} - {answer}:
            score, expected = judge(other, truth), scorer.score_answer(other, json.loads(truth)["entry"])
            assert score.components["score"] == pytest.approx(expected, abs=1e-12)
            assert score.correct == (expected == 1.0) and score.well_formed
            assert score.reward == pytest.approx(-0.5 + 3.5 * expected)
            different += expected < 1.0
    assert different


@pytest.mark.parametrize("task", ["rubiks_cube", "propositional_logic", "rush_hour"])
def test_questions_without_an_answer_of_the_librarys_are_judged(task):
    truth, entry, library = truth_of(task)
    assert entry["answer"] is None
    for answer in ("U R F", "(P ∧ Q)", "B+1"):
        score, expected = judge(answer, truth), library.score_answer(answer, entry)
        assert score.components["score"] == pytest.approx(expected) and score.reward == pytest.approx(
            3.0 if expected == 1.0 else -0.5 + 3.5 * expected
        )


def test_partial_credit_moves_from_wrong_to_right():
    truth = json.dumps(
        {
            "task": "spell_backward",
            "config": {},
            "entry": {"question": "Spell this word backward: hello", "answer": "olleh", "metadata": {}},
        }
    )
    score = judge("ollex", truth)  # four letters of five
    assert score.reward == pytest.approx(1 - 1.5 + 0.8 * 3.5) and not score.correct and score.well_formed
    assert score.components == pytest.approx({"format": 1.0, "answer": 1.3, "accuracy": 0.0, "score": 0.8})
    assert score.reason == "wrong: 0.8 of 1"
    assert judge("xxxxx", truth).reward == -0.5 and judge("xxxxx", truth).reason == "wrong"
    assert judge("ollex", truth, ReasoningGymReward(partial=False)).reward == -0.5
    assert judge("ollex", truth, ReasoningGymReward(mode="answer")).reward == pytest.approx(1.3)
    assert [judge(a, truth, ReasoningGymReward(mode="binary")).reward for a in ("olleh", "ollex")] == [1.0, 0.0]
    assert REWARD("olleh", truth).reward == -3.0 and REWARD("olleh", truth).components["score"] == 0.0


def test_a_tasks_options_count():
    """A tolerance that is an option of the task: 0.5 is near 0.53 to one decimal place, not to five."""
    entry = {"question": "?", "answer": "0.53", "metadata": {}}
    loose, strict = (
        json.dumps({"task": "decimal_arithmetic", "config": {"max_num_decimal_places": n}, "entry": entry})
        for n in (1, 5)
    )
    assert judge("0.5", loose).correct and not judge("0.5", strict).correct
    sized = json.dumps({"task": "decimal_arithmetic", "config": {"size": 10**9, "seed": 7}, "entry": entry})
    assert judge("0.53", sized).correct


def test_what_a_scorer_raises_is_a_wrong_answer():
    truth, entry, library = truth_of("prime_factorization")
    with pytest.raises(ValueError):
        library.score_answer("seven", entry)
    score = judge("seven", truth)
    assert (score.reward, score.correct, score.well_formed) == (-0.5, False, True)
    assert score.reason.startswith("wrong: scorer raised ValueError: ") and score.reason.isascii()


@pytest.mark.parametrize("said", [math.nan, 1.5, -0.1])
def test_a_score_that_is_none_is_a_wrong_answer(said, monkeypatch):
    truth, _, library = truth_of("chain_sum")
    monkeypatch.setattr(type(library), "score_answer", lambda self, answer, entry: said)
    assert judge("4", truth).reason == f"wrong: scorer said {said}"


@pytest.mark.parametrize(
    "truth",
    [
        "",
        "{}",
        "[]",
        "4",
        "null",
        "[" * 100_000,
        '{"task": "chain_sum", "config": {}}',
        '{"task": "chain_sum", "config": [], "entry": {"question": "?", "answer": "4", "metadata": {}}}',
        '{"task": "chain_sum", "config": {}, "entry": {"question": "?", "answer": "4"}}',
    ],
)
def test_a_ground_truth_of_something_else_is_the_data_sets_fault(truth):
    with pytest.raises(GroundTruthError, match="ground truth is not JSON with task, config and entry"):
        judge("4", truth)


@pytest.mark.parametrize(("task", "config"), [("chain_sums", {}), ("chain_sum", {"terms": 3}), ("composite", {})])
def test_a_task_that_cannot_be_made_is_the_data_sets_fault(task, config):
    entry = {"question": "?", "answer": "4", "metadata": {}}
    with pytest.raises(GroundTruthError, match=f"reasoning-gym has no task '{task}' with options "):
        judge("4", json.dumps({"task": task, "config": config, "entry": entry}))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mode", "dumb", "mode: 'dumb' is unknown; known: dump"),
        ("partial", 1, "partial: 1 must be true or false"),
        ("end_tokens", "<bye>", "end_tokens: '<bye>'"),
        ("colour", "red", "colour: no such option"),
    ],
)
def test_bad_options_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        reward_fn("reasoning_gym", {option: value})


def test_without_the_library_nothing_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"model\.data\.rewards\.rg_\*\.name: .*pip install reasoning-gym"):
        RewardPool({"rg_*": "reasoning_gym"}, ["rg_chain_sum"])


@pytest.mark.parametrize("answer", ["1" * 1_000_000, "[" * 1_000_000, " 1" * 500_000])
def test_a_long_answer_is_not_given_to_the_library(answer):
    truth, _, _ = truth_of("number_sorting")
    assert judge(answer, truth).reason == "unreadable: answer too long"
    assert judge("[" * 1500, truth).reason == "wrong"  # deep, and within the limit


EVALUATED = [
    "string_insertion",
    "spiral_matrix",
    "binary_matrix",
    "n_queens",
    "simple_integration",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "countdown",
]


@pytest.mark.parametrize("task", EVALUATED)
def test_an_answer_is_not_run_as_a_program(task, tmp_path):
    """These tasks' scorers evaluate the answer as Python: without the guard each of these texts makes a file."""
    truth, entry, library = truth_of(task)
    path = tmp_path / "made"
    name = "+".join(f"chr({ord(c)})" for c in f"open({str(path)!r},'w')")
    for answer in (f"open({str(path)!r}, 'w')", f"eval({name})", f"__import__('pathlib').Path({str(path)!r}).touch()"):
        assert not judge(answer, truth).correct
        assert not path.exists()
    with contextlib.suppress(Exception):  # after it did so
        library.score_answer(f"open({str(path)!r}, 'w')", entry)
    assert path.exists()


@pytest.mark.parametrize("task", ["simple_integration", "polynomial_multiplication", "puzzle24", "countdown"])
def test_mathematics_that_scorers_evaluate_is_evaluated(task):
    for index in range(8):
        truth, entry, _ = truth_of(task, seed=20, index=index)
        assert judge(entry["answer"], truth).correct, entry["answer"]


def test_lists_that_scorers_evaluate_are_evaluated():
    truth, entry, _ = truth_of("spiral_matrix")
    assert judge(str(entry["answer"].split()), truth).components["score"] == 0.1
    assert not judge("Integral(x, x)", truth_of("intermediate_integration")[0]).correct


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(exclude_characters="<>"), max_size=80), st.sampled_from(["knights_knaves", "bf", "countdown"])
)
def test_no_text_raises(noise, task):
    truth, entry, _ = truth_of(task)
    for text in (noise, tagged(noise)):
        score = REWARD(text, truth)
        assert math.isfinite(score.reward) and (not score.correct or noise.strip() == entry["answer"])


def test_processes_judge_alike_and_stay_light(rows):
    mapping = {"rg_*": {"name": "reasoning_gym", "mode": "dump"}, "look": "tests.unit.faulty_rewards:obey"}
    sources = sorted({source for source, _, _ in rows})
    jobs = [Job(source, tagged(answer if i % 2 else "no"), truth) for i, (source, answer, truth) in enumerate(rows)]
    look = [Job("look", "loaded torch transformers omegaconf hydra pyarrow megatron.core pytest", "")]
    with RewardPool(mapping, [*sources, "look"], workers=1, timeout_s=60) as pool:
        scores, faults = pool.score_all(jobs + look)
    assert scores[-1].reason == "crash: RuntimeError: none of them"
    assert scores[:-1] == [REWARD(job.text, job.ground_truth) for job in jobs]
    assert sum(score.correct for score in scores) >= len(jobs) // 2
    assert all(fault == Faults() for source, fault in faults.items() if source != "look")
