"""Worked solutions: what a warm start learns from."""

from __future__ import annotations

import ast
import itertools
import json
import random

import pytest

from kk.generate import iter_puzzles
from kk.puzzle import solve
from kk.trace import holds, trials, worked_solution
from megatron_dump.rewards.kk import kk_reward


def _puzzles(n: int, count: int = 60):
    for row in itertools.islice(iter_puzzles(n, seed=3), count):
        yield row, ast.literal_eval(row["statements"])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_patient_demonstrator_is_always_right(n):
    for row, statements in _puzzles(n):
        text = worked_solution(statements, row["names"], random.Random(0))
        truth = json.dumps({"solution_text_format": row["solution_text_format"], "statements": row["statements"]})
        assert kk_reward(text, truth).reward == 3.0


def test_a_quoting_demonstrator_says_the_truth_of_what_the_puzzle_says():
    """Every clause is the puzzle's own, in its order, and true exactly if the roles tried make it so."""
    for row, statements in _puzzles(3):
        for roles, words, passed in trials(statements, row["names"], quoted=True):
            plain = next(ok for other, _, ok in trials(statements, row["names"]) if other == roles)
            assert passed == plain and words[-1] == ("ok" if passed else "no")
            knights = dict(zip(row["names"], roles, strict=True))
            said = [word.lower() for word, verdict in itertools.pairwise(words) if verdict in ("true", "false")]
            quiz, place = row["quiz"].lower(), 0
            for clause in said:
                place = quiz.index(clause, place) + len(clause)
            for word, verdict in itertools.pairwise(words):
                if verdict in ("true", "false"):
                    name, _, claim = word.partition(" is ")
                    is_so = (claim.removeprefix("not ") == "a knight") == knights[name]
                    assert verdict == ("true" if is_so != claim.startswith("not ") else "false")
        text = worked_solution(statements, row["names"], random.Random(0), quoted=True)
        truth = json.dumps({"solution_text_format": row["solution_text_format"], "statements": row["statements"]})
        assert kk_reward(text, truth).reward == 3.0


def test_trials_pass_exactly_for_the_solver_s_solutions():
    for row, statements in _puzzles(4):
        passed = [roles for roles, _, ok in trials(statements, row["names"]) if ok]
        assert passed == [tuple(s) for s in solve(statements)]


def test_haste_is_a_probability_of_giving_up():
    rows = list(_puzzles(3, 400))
    rng = random.Random(1)
    given_up = possible = 0
    for row, statements in rows:
        text = worked_solution(statements, row["names"], rng, haste=0.3)
        last = text.split(" </think>")[0].split()[-1]
        possible += text.count(" no ")
        given_up += last == "no"
    assert given_up / possible == pytest.approx(0.3, abs=0.05)


def test_a_puzzle_without_a_solution_is_an_error():
    paradox = (("lying", 1), ("telling-truth", 0))
    assert not any(
        holds(paradox[0], (a, b)) == a and holds(paradox[1], (a, b)) == b for a in (True, False) for b in (True, False)
    )
    with pytest.raises(ValueError, match="Zoey, Sam"):
        worked_solution(paradox, ["Zoey", "Sam"], random.Random(0))
