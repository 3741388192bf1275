"""The solver, the grammar and the canonical form, against definitions written out the slow way."""

import collections
import itertools
import random

import numpy as np
import pytest

from kk.puzzle import all_statements, canonical, leaves, random_statements, solve, unique_solution


def holds(statement, knights):
    """The truth of a statement when knights[i] tells whether person i is one: the definition, recursively."""
    kind, *parts = statement
    if kind == "telling-truth":
        return knights[parts[0]]
    if kind == "lying":
        return not knights[parts[0]]
    values = [holds(part, knights) for part in parts]
    if kind == "not":
        return not values[0]
    left, right = values
    return {"and": left and right, "or": left or right, "->": not left or right, "<=>": left == right}[kind]


def brute_force(statements):
    every = itertools.product((False, True), repeat=len(statements))
    return {k for k in every if all(holds(s, k) == k[i] for i, s in enumerate(statements))}


def relabel(statement, new):
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return (kind, new[parts[0]])
    return (kind, *(relabel(part, new) for part in parts))


def relabelled(statements, new):
    """The same puzzle when person i is called new[i]."""
    out = [None] * len(statements)
    for i, statement in enumerate(statements):
        out[new[i]] = relabel(statement, new)
    return tuple(out)


@pytest.mark.parametrize("n", range(2, 8))
def test_solver_agrees_with_brute_force(n):
    rng = random.Random(n)
    kinds_of_outcome = set()
    for _ in range(120):
        statements = random_statements(rng, n)
        expected = brute_force(statements)
        found = solve(statements)
        assert len(found) == len(set(found)) and set(found) == expected
        assert unique_solution(statements) == (found[0] if len(expected) == 1 else None)
        kinds_of_outcome.add(min(len(expected), 2))
    assert kinds_of_outcome == {0, 1, 2}


def test_published_example():
    statements = (("lying", 1), ("and", ("telling-truth", 0), ("telling-truth", 1)))
    assert unique_solution(statements) == (True, False)


def test_statements_outside_the_grammar_are_refused():
    with pytest.raises(KeyError, match="lying"):
        solve((("lying", 2), ("lying", 0)))
    with pytest.raises(ValueError, match="unknown kind of statement 'xor'"):
        solve((("xor", ("lying", 1), ("lying", 0)), ("lying", 0)))


def test_grammar_has_the_published_frequencies():
    rng, n, puzzles = np.random.default_rng(0), 3, 4000
    kinds, first_leaves = collections.Counter(), collections.Counter()
    for _ in range(puzzles):
        for speaker, statement in enumerate(random_statements(rng, n)):
            kind, *parts = statement
            plain = kind in ("telling-truth", "lying")
            kinds["leaf" if plain else kind] += 1
            said = [statement] if plain else parts
            assert len(said) == len(set(said)) and ("lying", speaker) not in said
            if speaker == 0:
                first_leaves.update(said)
    assert set(kinds) == {"leaf", "not", "and", "or", "->", "<=>"}
    assert all(abs(count / (n * puzzles) - 1 / 6) < 0.02 for count in kinds.values())
    assert set(first_leaves) == set(leaves(0, n)) and len(leaves(0, n)) == 2 * n - 1
    total = sum(first_leaves.values())
    assert all(abs(count / total - 1 / (2 * n - 1)) < 0.02 for count in first_leaves.values())


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_statements_is_what_the_grammar_draws(n):
    rng = random.Random(0)
    drawn = {random_statements(rng, n)[1] for _ in range(6000 if n > 2 else 2000)}
    every = list(all_statements(1, n))
    count = 2 * n - 1
    assert len(every) == len(set(every)) == 2 * count + 4 * count * (count - 1)
    assert drawn == set(every)


def test_one_person_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        random_statements(random.Random(0), 1)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 14])
def test_canonical_does_not_depend_on_who_is_who(n):
    rng = random.Random(n)
    for _ in range(30):
        statements = random_statements(rng, n)
        new = rng.sample(range(n), n)
        assert canonical(relabelled(statements, new)) == canonical(statements)


def test_canonical_does_not_depend_on_order_or_double_negation():
    one = (("and", ("lying", 1), ("telling-truth", 2)), ("not", ("lying", 0)), ("->", ("lying", 0), ("lying", 1)))
    same = (("and", ("telling-truth", 2), ("lying", 1)), ("telling-truth", 0), ("->", ("lying", 0), ("lying", 1)))
    other = (("and", ("telling-truth", 2), ("lying", 1)), ("telling-truth", 0), ("->", ("lying", 1), ("lying", 0)))
    assert canonical(one) == canonical(same) != canonical(other)


def test_canonical_breaks_ties_of_symmetric_puzzles():
    ring = tuple(("lying", (i + 1) % 6) for i in range(6))
    triangles = tuple(("lying", i // 3 * 3 + (i + 1) % 3) for i in range(6))
    assert canonical(ring) != canonical(triangles)
    for puzzle in (ring, triangles):
        for new in itertools.islice(itertools.permutations(range(6)), 0, None, 31):
            assert canonical(relabelled(puzzle, new)) == canonical(puzzle)


def plainly(statement):
    """Without "not", and with the sides of symmetric operators as a set."""
    kind, *parts = statement
    if kind == "not":
        return ("lying" if parts[0][0] == "telling-truth" else "telling-truth", parts[0][1])
    return (kind, frozenset(parts)) if kind in ("and", "or", "<=>") else statement


@pytest.mark.parametrize("n", [2, 3])
def test_canonical_separates_what_no_relabelling_unites(n):
    rng = random.Random(1)
    puzzles = [random_statements(rng, n) for _ in range(150)]
    permutations = list(itertools.permutations(range(n)))
    orbits = [{tuple(map(plainly, relabelled(puzzle, new))) for new in permutations} for puzzle in puzzles]
    forms = [canonical(puzzle) for puzzle in puzzles]
    for i, j in itertools.combinations(range(len(puzzles)), 2):
        assert (forms[i] == forms[j]) == (tuple(map(plainly, puzzles[j])) in orbits[i])
