"""Changed puzzles: one place differs, in the statements and in the quiz, and the solution is another one."""

import ast
import collections
import itertools
import json
import random
import re

import pytest

from kk import perturb, text
from kk.changes import KINDS, changes
from kk.generate import iter_puzzles
from kk.grammar import PUBLISHED, Grammar, all_statements, leaves
from kk.puzzle import canonical, random_statements, unique_solution
from tests.unit.kk_reference import said, solutions

PUBLISHED_FRAMES = (
    "{name} said that {content}.",
    '{name} stated, "{content}".',
    'According to {name}, "{content}".',
    '"{content}," {name} declared.',
    '"{content}" - {name}.',
    'In a statement by {name}: "{content}".',
)


FIELDS = {
    "quiz",
    "names",
    "knight_knave",
    "solution",
    "solution_text",
    "solution_text_format",
    "cot_head",
    "cot_repeat_steps",
    "cot_foot",
    "statements",
    "index",
}


def run(capsys, *arguments):
    """Exit code and what was said to stdout and stderr."""
    code = perturb.main([str(word) for word in arguments])
    heard = capsys.readouterr()
    return code, heard.out, heard.err


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def generated(n, count):
    return list(itertools.islice(iter_puzzles(n, seed=11), count))


def published(n, count, a_knight="a knight", a_knave="a knave"):
    """Puzzles worded by the published templates, slips included ("said that If")."""
    rng = random.Random(n)
    for row in generated(n, count):
        statements, names = ast.literal_eval(row["statements"]), row["names"]
        clauses = [said(statement, names, a_knight, a_knave) for statement in statements]
        sentences = [
            rng.choice(PUBLISHED_FRAMES).format(name=name, content=clause[0].upper() + clause[1:])
            for name, clause in zip(names, clauses)
        ]
        words = text.Roles(a_knight.split()[1], a_knave.split()[1]).words
        yield {
            **row,
            "knight_knave": words,
            "quiz": f"You meet {n} inhabitants: {', '.join(names[:-1])}, and {names[-1]}. {' '.join(sentences)} So who "
            f"is {a_knight} and who is {a_knave}?",
            "solution_text_format": row["solution_text_format"]
            .replace("a knight", a_knight)
            .replace("a knave", a_knave),
        }


def leaves_changed(before, after):
    """How many leaves differ; None when something else does, too."""
    if before[0] in ("telling-truth", "lying"):
        return int(before != after) if after[0] in ("telling-truth", "lying") else None
    if before[0] != after[0] or len(before) != len(after):
        return None
    counts = [leaves_changed(*pair) for pair in zip(before[1:], after[1:])]
    return None if None in counts else sum(counts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_one_place_changes_and_the_solution_is_another(n, kind, tmp_path, capsys):
    rows = generated(n, 40)
    source = write(tmp_path / "x.jsonl", rows)
    code, out, _ = run(capsys, "--in", source, "--kind", kind, "--out", tmp_path / "y.jsonl", "--per-puzzle", "3")
    assert code == 0
    by_index = collections.defaultdict(list)
    for row in read(tmp_path / "y.jsonl"):
        by_index[row["index"]].append(row)
    without = len(rows) - len(by_index)
    assert f"{sum(map(len, by_index.values()))} changed puzzles of 40; {without} have no change of one {kind}" in out
    assert len(by_index) > (12 if n == 2 else 30)
    for index, changed in by_index.items():
        before, first = rows[index], ast.literal_eval(rows[index]["statements"])
        assert len(changed) <= 3 and len({row["statements"] for row in changed}) == len(changed)
        for row in changed:
            assert set(row) == FIELDS
            after = ast.literal_eval(row["statements"])
            (person,) = [i for i in range(n) if first[i] != after[i]]
            assert kind == "statement" or leaves_changed(first[person], after[person]) == 1
            assert solutions(after) == {tuple(row["solution"])} != solutions(first)
            assert row["names"] == before["names"]
            assert row["solution_text_format"] == text.solution_text_format(row["solution"], row["names"])


@pytest.mark.parametrize(
    ("n", "grammar", "roles"),
    [
        (2, PUBLISHED, text.KNIGHTS),
        (4, PUBLISHED, text.Roles("altruist", "egoist")),
        (3, Grammar(depth=3), text.KNIGHTS),
        (4, Grammar(depth=3, width=4), text.Roles("saint", "sinner")),
    ],
)
def test_the_changed_quiz_is_the_one_that_would_have_been_written(n, grammar, roles, tmp_path, capsys):
    """Letter by letter, for puzzles of any grammar and roles whose frames are known."""
    rng, rows = random.Random(n), []
    while len(rows) < 50:
        statements = random_statements(rng, n, grammar)
        if len(found := solutions(statements)) != 1:
            continue
        (solution,), names, frames = found, rng.sample(text.NAMES, n), [rng.choice(text.FRAMES) for _ in range(n)]
        listing = text.solution_text_format(solution, names, roles)
        rows.append(
            {
                "quiz": text.quiz_text(statements, names, frames, roles),
                "names": names,
                "knight_knave": roles.words,
                "solution_text_format": listing,
                "statements": repr(statements),
                "index": len(rows),
                "frames": frames,
            }
        )
    source = write(tmp_path / "x.jsonl", rows)
    for kind in KINDS:
        assert run(capsys, "--in", source, "--kind", kind, "--out", tmp_path / "y.jsonl")[0] == 0
        for row in read(tmp_path / "y.jsonl"):
            frames, statements = rows[row["index"]]["frames"], ast.literal_eval(row["statements"])
            assert row["quiz"] == text.quiz_text(statements, row["names"], frames, roles)
            assert solutions(statements) == {tuple(row["solution"])}
            assert row["solution_text_format"] == text.solution_text_format(row["solution"], row["names"], roles)
            assert row["cot_repeat_steps"]


@pytest.mark.parametrize("words", [("a knight", "a knave"), ("an angel", "a devil")])
def test_published_wordings(words, tmp_path, capsys):
    rows = list(published(4, 60, *words))
    source = write(tmp_path / "x.jsonl", rows)
    assert run(capsys, "--in", source, "--kind", "statement", "--out", tmp_path / "y.jsonl")[0] == 0
    changed = read(tmp_path / "y.jsonl")
    assert len(changed) > 50
    for row in changed:
        rest, statements = row["quiz"].split("inhabitants: ")[1], ast.literal_eval(row["statements"])
        for statement in statements:  # every claim is there, in the people's order
            claim = said(statement, row["names"], *words)
            at = rest.lower().find(claim.lower())
            assert at >= 0 and not re.search("|".join(words), rest[:at])
            rest = rest[at + len(claim) :]
        assert rest.endswith(f"So who is {words[0]} and who is {words[1]}?")
        assert f"{row['names'][0]} is {words[not row['solution'][0]]}" in row["solution_text_format"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 3])
def test_all_changes_are_found(kind, n):
    rng = random.Random(5)
    for _ in range(12):
        statements = random_statements(rng, n)
        before = solutions(statements)
        if len(before) != 1:
            continue
        others = {
            (*statements[:i], other, *statements[i + 1 :])
            for i in range(n)
            for other in all_statements(i, n)
            if kind == "statement" or leaves_changed(statements[i], other) == 1
        }
        wanted = {other for other in others if len(found := solutions(other)) == 1 and found != before}
        got = [change.statements for change in changes(statements, kind, random.Random(0))]
        assert len(got) == len(set(got)) and set(got) <= wanted
        # A leaf's changes are all tried; statements are drawn, and rare ones may not come up.
        assert set(got) == wanted if kind == "leaf" else len(got) >= 0.9 * len(wanted)


def test_the_first_change_of_a_leaf_is_a_draw_until_one_fits():
    statements = (("and", ("lying", 1), ("telling-truth", 2)), ("not", ("lying", 2)), ("telling-truth", 0))
    before = unique_solution(statements)
    assert before is not None
    rng, direct = random.Random(0), collections.Counter()
    while direct.total() < 4000:  # the definition: a person, a leaf of his, a new leaf; again until it fits
        person = rng.randrange(3)
        statement, new = statements[person], rng.choice(leaves(person, 3))
        if statement[0] == "and":
            i = rng.randrange(1, 3)
            changed = ("and", *(new if j == i else part for j, part in enumerate(statement) if j))
            if changed[1] == changed[2]:
                continue
        else:
            changed = ("not", new) if statement[0] == "not" else new
        after = (*statements[:person], changed, *statements[person + 1 :])
        if len(found := solutions(after)) == 1 and found != {before}:
            direct[after] += 1
    ours = collections.Counter(next(changes(statements, "leaf", random.Random(i))).statements for i in range(4000))
    assert set(ours) == set(direct)
    assert all(abs(ours[key] - direct[key]) < 5 * (2 * 4000 * 0.25) ** 0.5 for key in ours)


def test_deterministic_by_seed_and_independent_of_other_rows(tmp_path, capsys):
    rows = generated(4, 30)
    everything, some = write(tmp_path / "x.jsonl", rows), write(tmp_path / "some.jsonl", rows[::-3])

    def made(source, seed):
        assert run(capsys, "--in", source, "--kind", "leaf", "--out", tmp_path / "y.jsonl", "--seed", seed)[0] == 0
        return {row["index"]: row for row in read(tmp_path / "y.jsonl")}

    one = made(everything, 1)
    assert one == made(everything, 1) != made(everything, 2)
    assert all(one[index] == row for index, row in made(some, 1).items())


def test_new_classes_are_none_of_the_file(tmp_path, capsys):
    rows = generated(3, 200)
    source = write(tmp_path / "x.jsonl", rows)
    known = {canonical(ast.literal_eval(row["statements"])) for row in rows}
    forms = {}
    for options in ([], ["--new-classes"]):
        assert run(capsys, "--in", source, "--kind", "leaf", "--out", tmp_path / "y.jsonl", *options)[0] == 0
        forms[bool(options)] = [canonical(ast.literal_eval(row["statements"])) for row in read(tmp_path / "y.jsonl")]
    assert known & set(forms[False]) and not known & set(forms[True]) and len(forms[True]) > 50


@pytest.mark.parametrize(
    ("quiz", "message"),
    [
        ("You meet 2 inhabitants: {0} and {1}. They said things. So?", "'s statement '"),
        ("You meet 2 inhabitants: {0} and {1}. {2}. {3}. But {0} is a knight, surely. So?", "the quiz goes on after"),
        ("You meet 2 inhabitants: {0} and {1}. {0} is a knave! {2}. {3}. So?", "is not where it should be"),
    ],
)
def test_a_quiz_in_other_words_is_refused_by_place(quiz, message, tmp_path, capsys):
    (row,) = generated(2, 1)
    names, statements = row["names"], (("telling-truth", 1), ("lying", 0))
    assert not solutions(statements)
    statements = (("and", ("telling-truth", 1), ("telling-truth", 0)), ("lying", 0))
    (solution,) = solutions(statements)
    row |= {
        "quiz": quiz.format(*names, *(said(s, names) for s in statements)),
        "statements": repr(statements),
        "solution": list(solution),
        "solution_text_format": text.solution_text_format(solution, names),
    }
    source = write(tmp_path / "x.jsonl", [row])
    code, _, error = run(capsys, "--in", source, "--kind", "statement", "--out", tmp_path / "y.jsonl")
    assert code == 1 and error.startswith(f"error: {source}:1: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "y.jsonl").exists()


def test_a_file_without_changes_is_an_error(tmp_path, capsys):
    rows = generated(2, 60)
    source = write(tmp_path / "x.jsonl", rows)
    run(capsys, "--in", source, "--kind", "leaf", "--out", tmp_path / "y.jsonl")
    found = {row["index"] for row in read(tmp_path / "y.jsonl")}
    source = write(tmp_path / "x.jsonl", [row for row in rows if row["index"] not in found])
    code, _, error = run(capsys, "--in", source, "--kind", "leaf", "--out", tmp_path / "z.jsonl")
    assert code == 1 and "has a change of one leaf" in error and not (tmp_path / "z.jsonl").exists()
    assert run(capsys, "--in", source, "--kind", "leaf", "--out", tmp_path / "z.jsonl", "--per-puzzle", "0")[0] == 1
    assert run(capsys, "--in", tmp_path / "no.jsonl", "--kind", "leaf", "--out", tmp_path / "z.jsonl")[0] == 1
