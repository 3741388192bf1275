"""The grammar, the solvers, the canonical form and the split, against definitions written out the slow way."""

import collections
import hashlib
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kk import batch, batch_classes, batch_reasoning, batch_solver, reasoning, second_solver, solver
from kk.grammar import PUBLISHED, Grammar, is_constant, people_named
from kk.puzzle import (
    all_statements,
    canonical,
    class_of,
    depth,
    leaves,
    meaning,
    random_statements,
    solve,
    split_of,
    unique_solution,
)
from tests.unit.kk_reference import holds, solutions

DEEP = Grammar(depth=3, width=3)


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


def every(n):
    return list(itertools.product((False, True), repeat=n))


def drawn(n, count, grammar=PUBLISHED, seed=0):
    """(space, codes [count, n], the same puzzles as statements)."""
    space = batch.space(n, grammar)
    codes = space.draw(batch.Draws(f"test {seed}"), count)
    return space, codes, [tuple(space.statements[code] for code in row) for row in codes]


# -------------------------------------------------------------------------------------------------------- the solvers
@pytest.mark.parametrize("grammar", [PUBLISHED, DEEP, Grammar(1, 2), Grammar(4, 2)])
@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_all_solvers_agree_with_brute_force(n, grammar, monkeypatch):
    if grammar.width > 2 * n - 1:
        pytest.skip("too wide")
    rng = random.Random(n)
    outcomes = set()
    for _ in range(80):
        statements = random_statements(rng, n, grammar)
        expected = solutions(statements)
        found = solve(statements)
        assert len(found) == len(set(found)) and set(found) == expected
        assert unique_solution(statements) == (found[0] if len(expected) == 1 else None)
        assert set(second_solver.solutions(statements, limit=1000)) == expected
        with monkeypatch.context() as patch:
            patch.setattr(solver, "BIT_PEOPLE", 1)  # the solver for many people
            assert set(solve(statements)) == expected
        outcomes.add(min(len(expected), 2))
    # of leaves alone, the opposite of a solution is one, too
    assert outcomes == ({0, 2} if grammar.depth == 1 else {0, 1, 2})


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 9])
def test_the_batch_solver_agrees_with_brute_force(n):
    space, codes, puzzles = drawn(n, 150)
    count, roles = batch_solver.solve_many(space, codes)
    assert set(count) == {0, 1, 2}
    for statements, k, row in zip(puzzles, count, roles):
        expected = solutions(statements)
        assert k == min(len(expected), 2)
        assert k != 1 or expected == {tuple(row)}


@pytest.mark.parametrize("n", [12, 14, 16, 17, 23, 40, 41, 60])
def test_solvers_agree_for_many_people(n):
    space, codes, puzzles = drawn(n, 60)
    count, roles = batch_solver.solve_many(space, codes)
    for statements, k, row in zip(puzzles, count, roles):
        found = second_solver.solutions(statements)
        assert len(found) == k
        assert k != 1 or found == [tuple(row)]
        assert all(holds(s, found[0]) == found[0][i] for i, s in enumerate(statements) if found)
        if n <= 17:
            assert sorted(solve(statements))[:2] == sorted(found) or k == 2
            assert set(found) <= set(solve(statements))


def test_published_example():
    statements = (("lying", 1), ("and", ("telling-truth", 0), ("telling-truth", 1)))
    assert unique_solution(statements) == (True, False)
    assert second_solver.solutions(statements) == [(True, False)]


def test_statements_outside_the_grammar_are_refused():
    with pytest.raises(KeyError, match="lying"):
        solve((("lying", 2), ("lying", 0)))
    with pytest.raises(ValueError, match="unknown kind of statement 'xor'"):
        solve((("xor", ("lying", 1), ("lying", 0)), ("lying", 0)))


# -------------------------------------------------------------------------------------------------------- the grammar
def frequencies(puzzles):
    """Kinds of all statements, and what speaker 0 says of whom; asserts what always holds."""
    kinds, said_by_first = collections.Counter(), collections.Counter()
    for statements in puzzles:
        for speaker, statement in enumerate(statements):
            kind, *parts = statement
            plain = kind in ("telling-truth", "lying")
            kinds["leaf" if plain else kind] += 1
            said = [statement] if plain else parts
            assert len(said) == len(set(said)) and ("lying", speaker) not in said
            if speaker == 0:
                said_by_first.update(said)
    return kinds, said_by_first


@pytest.mark.parametrize("how", ["one by one", "many at a time"])
def test_grammar_has_the_published_frequencies(how):
    n, count = 3, 8000
    rng = np.random.default_rng(0)
    puzzles = [random_statements(rng, n) for _ in range(count)] if how == "one by one" else drawn(n, count)[2]
    kinds, said = frequencies(puzzles)
    assert set(kinds) == {"leaf", "not", "and", "or", "->", "<=>"}
    assert all(abs(k / (n * count) - 1 / 6) < 0.015 for k in kinds.values())
    assert set(said) == set(leaves(0, n)) and len(leaves(0, n)) == 2 * n - 1
    assert all(abs(k / said.total() - 1 / (2 * n - 1)) < 0.015 for k in said.values())


@pytest.mark.parametrize("grammar", [PUBLISHED, Grammar(constants=False), Grammar(repeats=False)])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_statements_is_what_the_grammars_draw(n, grammar):
    rng = random.Random(0)
    listed = list(all_statements(1, n, grammar))
    space, _, puzzles = drawn(n, 12000, grammar)
    assert {random_statements(rng, n, grammar)[1] for _ in range(9000)} == set(listed)
    assert {statements[1] for statements in puzzles} == set(listed)
    assert [space.statements[code] for code in space.said_by(1)] and len(listed) == len(set(listed))
    assert {space.statements[code] for code in space.said_by(1)} == set(listed)
    if grammar == PUBLISHED:
        count = 2 * n - 1
        assert len(listed) == 2 * count + 4 * count * (count - 1)


def test_a_constant_statement_is_true_or_false_whoever_is_what():
    rng = random.Random(2)
    seen = set()
    for grammar in (PUBLISHED, DEEP):
        for _ in range(300):
            for statement in random_statements(rng, 3, grammar):
                constant = len({holds(statement, roles) for roles in every(3)}) == 1
                assert is_constant(statement) == constant
                seen.add(constant)
    assert seen == {False, True}


def test_deeper_and_wider_statements():
    rng = random.Random(3)
    puzzles = [random_statements(rng, 5, Grammar(3, 4, constants=False, repeats=False)) for _ in range(400)]
    statements = [s for puzzle in puzzles for s in puzzle]
    assert {depth(s) for s in statements} == {1, 2, 3}
    assert {len(s) - 1 for s in statements if s[0] in ("and", "or")} == {2, 3, 4}
    assert {len(s) - 1 for s in statements if s[0] in ("->", "<=>")} == {2}
    assert any(s[0] == "not" and s[1][0] == "and" for s in statements)
    for statement in statements:
        named = people_named(statement)
        assert len(named) == len(set(named)) and not is_constant(statement)


@pytest.mark.parametrize(
    ("grammar", "n", "message"),
    [
        (PUBLISHED, 1, "people=1: a puzzle needs at least 2 people"),
        (Grammar(depth=0), 3, "depth=0: must be at least 1"),
        (Grammar(width=1), 3, "width=1: must be from 2 to 5"),
        (Grammar(width=6), 3, "width=6: must be from 2 to 5"),
        (Grammar(depth=4, width=3), 3, "could have 27 leaves; at most 16"),
    ],
)
def test_impossible_grammars_are_refused(grammar, n, message):
    with pytest.raises(ValueError, match=message):
        random_statements(random.Random(0), n, grammar)


def test_draws_depend_on_the_key_alone():
    one, again, other = batch.Draws("a"), batch.Draws("a"), batch.Draws("b")
    assert one.below(10, (50,)).tolist() == again.below(10, (50,)).tolist() != other.below(10, (50,)).tolist()
    # Frozen: data sets made with another version of numpy must stay the same.
    assert batch.Draws("kk").below(1000, (6,)).tolist() == [201, 970, 830, 747, 445, 23]
    for pool in (5, 60, 5000):
        chosen = batch.Draws("subsets").subsets(pool, 5, 2000)
        assert chosen.min() >= 0 and chosen.max() < pool
        assert all(len(set(row)) == 5 for row in chosen.tolist())
        assert abs(chosen[:, 3].mean() / (pool - 1) - 0.5) < 0.03


# -------------------------------------------------------------------------------------------------- the canonical form
@pytest.mark.parametrize("grammar", [PUBLISHED, Grammar(3, 3)])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 14])
def test_canonical_does_not_depend_on_who_is_who(n, grammar):
    rng = random.Random(n)
    for _ in range(30):
        statements = random_statements(rng, n, grammar)
        new = rng.sample(range(n), n)
        assert canonical(relabelled(statements, new)) == canonical(statements)
        assert class_of(relabelled(statements, new)) == class_of(statements)
        assert split_of(relabelled(statements, new)) == split_of(statements)


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


# ----------------------------------------------------------------------------------------------- meaning and the split
def table(statement, n):
    return tuple(holds(statement, roles) for roles in every(n))


def test_meaning_is_one_statement_for_each_truth_table_about_two_people():
    meanings = collections.defaultdict(set)
    for statement in all_statements(0, 3):
        meanings[table(statement, 3)].add(meaning(statement))
    for statement in random_statements(random.Random(0), 2, Grammar(3, 3)):
        meant = meaning(statement)
        assert meant in (("and",), ("or",)) or table(meant, 2) == table(statement, 2)
    assert len(meanings) == 34 and all(len(same) == 1 for same in meanings.values())
    assert len({meant for same in meanings.values() for meant in same}) == len(meanings)
    for truth, (meant,) in meanings.items():
        assert table(meant, 3) == truth if meant[1:] else set(truth) == {meant[0] == "and"}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**9))
def test_other_words_for_the_same_do_not_change_the_class(n, seed):
    rng = random.Random(seed)
    statements = random_statements(rng, n)
    by_table = collections.defaultdict(list)
    for speaker, statement in enumerate(statements):
        named = set(people_named(statement))
        for other in all_statements(speaker, n):
            if set(people_named(other)) | named == named and table(other, n) == table(statement, n):
                by_table[speaker].append(other)
    reworded = tuple(rng.choice(by_table[speaker]) for speaker in range(n))
    assert class_of(reworded) == class_of(statements)


@pytest.mark.parametrize("n", [2, 3, 5, 6, 9, 14, 20])
def test_classes_of_many_are_the_classes_of_each(n):
    space, codes, puzzles = drawn(n, 300)
    digests, sides = batch_classes.classes(space, codes)
    for statements, digest, side in zip(puzzles, digests, sides):
        assert class_of(statements) == int(digest).to_bytes(8, "big")
        assert split_of(statements) == {0: "train", 1: "test", -1: None}[int(side)]


def test_sides_have_their_shares():
    space, codes, _ = drawn(8, 4000)
    assert np.mean(batch_classes.classes(space, codes)[1] == 1) == pytest.approx(0.2, abs=0.03)
    space, codes, _ = drawn(4, 4000)
    sides = batch_classes.classes(space, codes)[1]
    assert [np.mean(sides == side) for side in (0, 1, -1)] == pytest.approx([0.48, 0.11, 0.41], abs=0.04)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_test_side_of_few_people_is_nothing_that_the_shipped_model_has_seen(n):
    """It was trained on the puzzles that this rule called training puzzles."""

    def rule(statements):
        digest = hashlib.blake2b(repr(canonical(statements)).encode(), digest_size=8).digest()
        return "train" if int.from_bytes(digest, "big") % 5 else "test"

    sides = [(split_of(statements), rule(statements)) for statements in drawn(n, 500)[2]]
    assert {(ours, theirs) for ours, theirs in sides if ours} == {("train", "train"), ("test", "test")}


def test_the_split_is_frozen():
    rng = random.Random(0)
    puzzles = [random_statements(rng, n) for n in (2, 4, 14) for _ in range(16)]
    sides = "".join({"train": "r", "test": "e", None: "-"}[split_of(puzzle)] for puzzle in puzzles)
    assert sides == "rr--errr-rrer-rrrrrr-eer--re-rrrerrrrrrrrerrrrre"


# ---------------------------------------------------------------------------------------------------------- reasoning
def replay(steps, statements):
    """The roles at the end of some steps, each of which is checked against all assignments."""
    n = len(statements)
    fits = [{roles for roles in every(n) if holds(s, roles) == roles[i]} for i, s in enumerate(statements)]

    def left(witness, known):
        return {roles for roles in fits[witness] if all(roles[p] == knight for p, knight in known.items())}

    levels = [{}]
    for step in steps:
        known = {p: knight for level in levels for p, knight in level.items()}
        if step.kind == reasoning.FORCED:
            assert {roles[step.person] for roles in left(step.witness, known)} <= {step.knight}
            levels[-1][step.person] = step.knight
        elif step.kind == reasoning.SUPPOSE:
            assert step.person not in known
            levels.append({step.person: True})
        elif step.kind == reasoning.CLASH:
            assert not left(step.witness, known)
        else:
            undone = levels.pop()
            assert next(iter(undone)) == step.person and not step.knight
            levels[-1][step.person] = False
    return {p: knight for level in levels for p, knight in level.items()}


@pytest.mark.parametrize(("n", "grammar"), [(2, PUBLISHED), (4, PUBLISHED), (6, PUBLISHED), (4, Grammar(3, 3))])
def test_every_step_of_the_reasoning_follows(n, grammar):
    rng, checked = random.Random(n), 0
    while checked < 60:
        statements = random_statements(rng, n, grammar)
        solution = unique_solution(statements)
        if solution is not None:
            assert replay(reasoning.reason(statements), statements) == dict(enumerate(solution))
            checked += 1


def test_reasoning_without_a_solution_is_an_error():
    with pytest.raises(ValueError, match="no assignment"):
        reasoning.reason((("lying", 1), ("telling-truth", 0)))


@pytest.mark.parametrize("n", [2, 3, 6, 14, 20])
def test_reasoning_of_many_is_the_reasoning_of_each(n):
    space, codes, puzzles = drawn(n, 400)
    rows = np.flatnonzero(batch_solver.solve_many(space, codes)[0] == 1)[:80]
    steps = batch_reasoning.reason_many(space, codes[rows])
    made = collections.defaultdict(list)
    for puzzle, kind, person, knight, witness in zip(*(column.tolist() for column in steps)):
        made[puzzle].append(reasoning.Step(kind, person, knight, witness))
    assert [made[i] for i in range(len(rows))] == [reasoning.reason(puzzles[row]) for row in rows]
