"""Generated puzzles: what a row says, the split, the command; and each known fault of other generators, by name."""

import ast
import collections
import itertools
import json
import re

import numpy as np
import pytest

from kk import chunks, generate, names, stream, text
from kk.generate import iter_puzzles
from kk.grammar import Grammar, all_statements, depth, is_constant, people_named
from kk.puzzle import canonical
from kk.reasoning import reason
from kk.supply import count_available, count_solvable
from tests.unit.kk_reference import holds, solutions

FIELDS = [
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
]


def some(n, count, **options):
    return list(itertools.islice(iter_puzzles(n, **{"seed": 7, **options}), count))


def statements_of(rows):
    return [ast.literal_eval(row["statements"]) for row in rows]


def relabelled(statements, new):
    """The same puzzle when person i is called new[i]."""

    def renamed(part):
        return tuple(map(renamed, part)) if isinstance(part, tuple) else new[part] if isinstance(part, int) else part

    called = renamed(statements)
    return tuple(called[new.index(person)] for person in range(len(new)))


def run(folder, *arguments):
    """Exit code of the command with --out folder."""
    return generate.main([*map(str, arguments), "--out", str(folder)])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("kk")
    assert run(out, "--people", "2-4", "--per-size", 60, "--test-per-size", 20, "--seed", 5) == 0
    return out


# --------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("options", [{}, {"grammar": Grammar(3, 3)}], ids=["published", "deep"])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_rows_have_the_published_fields_and_one_solution(n, options):
    for index, row in enumerate(some(n, 25, **options)):
        assert list(row) == FIELDS and row["index"] == index
        assert len(set(row["names"])) == len(row["solution"]) == n
        assert solutions(ast.literal_eval(row["statements"])) == {tuple(row["solution"])}
        lines = [
            f"({i}) {name} is a {'knight' if is_knight else 'knave'}"
            for i, (name, is_knight) in enumerate(zip(row["names"], row["solution"], strict=True), 1)
        ]
        assert row["solution_text_format"] == "\n".join(lines)
        assert re.findall(r"\w+ is a \w+", row["solution_text"]) == [line.split(") ")[1] for line in lines]


@pytest.mark.parametrize("n", [2, 3, 7, 14])
def test_lines_of_many_are_the_texts_of_each(n):
    """kk.render's lines from pieces against kk.text's sentences."""
    spec = chunks.Spec(n, 3, names=70, roles=text.parse_roles("knight/knave,altruist/egoist"))
    chunk = chunks.make_chunk(spec, 0)
    pool = names.names(70)
    for row, line in enumerate(chunk.lines(np.arange(60))):
        made = json.loads(line + "0}")
        statements = tuple(chunk.space.statements[code] for code in chunk.codes[row])
        people = [pool[i] for i in chunk.dress.people[row]]
        roles = spec.roles[chunk.dress.roles[row]]
        frames = [text.FRAMES[i] for i in chunk.dress.frames[row]]
        solution = chunk.solution[row].tolist()
        assert made == {
            "quiz": text.quiz_text(statements, people, frames, roles),
            "names": people,
            "knight_knave": roles.words,
            "solution": solution,
            "solution_text": text.solution_text(solution, people, roles),
            "solution_text_format": text.solution_text_format(solution, people, roles),
            "cot_head": text.COT_HEAD,
            "cot_repeat_steps": [text.step_text(step, statements, people, roles) for step in reason(statements)],
            "cot_foot": text.COT_FOOT,
            "statements": repr(statements),
            "index": 0,
        }
        assert line + "0}" == json.dumps(made)


def test_quiz_is_english():
    for row in some(4, 300):
        quiz = row["quiz"]
        assert f"You meet 4 inhabitants: {', '.join(row['names'][:3])}, and {row['names'][3]}. " in quiz
        assert quiz.endswith(" So who is a knight and who is a knave?")
        assert not re.search(r"[{}]|  |\.\.|\"\"", quiz)
        assert quiz.count('"') % 2 == 0


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (("telling-truth", 0), "Zoey is a knight"),
        (("lying", 1), "Sam is a knave"),
        (("not", ("lying", 1)), "Sam is not a knave"),
        (("not", ("telling-truth", 1)), "Sam is not a knight"),
        (("and", ("lying", 1), ("telling-truth", 0)), "Sam is a knave and Zoey is a knight"),
        (("or", ("lying", 1), ("lying", 0)), "Sam is a knave or Zoey is a knave"),
        (("->", ("lying", 1), ("lying", 0)), "if Sam is a knave then Zoey is a knave"),
        (("<=>", ("lying", 1), ("lying", 0)), "Sam is a knave if and only if Zoey is a knave"),
        (
            ("and", ("lying", 1), ("lying", 0), ("telling-truth", 0)),
            "Sam is a knave, Zoey is a knave, and Zoey is a knight",
        ),
        (
            ("not", ("or", ("lying", 1), ("not", ("lying", 0)))),
            "it is not true that (Sam is a knave or Zoey is not a knave)",
        ),
        (
            ("->", ("and", ("lying", 1), ("lying", 0)), ("lying", 0)),
            "if (Sam is a knave and Zoey is a knave) then Zoey is a knave",
        ),
    ],
)
def test_claims_in_words(statement, words):
    assert text.claim_text(statement, ["Zoey", "Sam"]) == words


def test_words_for_roles():
    roles = text.parse_roles("hero/villain,angel/devil,spy/boss")
    assert [r.many(True) for r in roles] == ["heroes", "angels", "spies"]
    assert [r.a(True) for r in roles] == ["a hero", "an angel", "a spy"]
    rows = some(3, 300, roles=roles)
    for row in rows:
        words = row["knight_knave"]
        assert words["a_knight"] in ("a hero", "an angel", "a spy")
        assert "knight" not in row["quiz"] + row["solution_text"] + "".join(row["cot_repeat_steps"])
        assert row["quiz"].endswith(f" So who is {words['a_knight']} and who is {words['a_knave']}?")
    assert {row["knight_knave"]["Knave"] for row in rows} == {"Villain", "Devil", "Boss"}
    for spec in ("saint", "saint/saint", "Saint/Sinner", "a/b/c", ""):
        with pytest.raises(ValueError, match=f"--roles {spec}: write two words"):
            text.parse_roles(spec)


def test_few_names_and_frames():
    rows = some(3, 200, names=4, frames=2)
    assert {name for row in rows for name in row["names"]} == set(text.NAMES[:4])
    assert all("told you" in row["quiz"] or "said" in row["quiz"] for row in rows)
    assert not any("remarked" in row["quiz"] or "words" in row["quiz"] for row in rows)


def test_names_are_distinct_words_and_go_on_beyond_the_list():
    assert len(set(text.NAMES)) == len(text.NAMES) == 60
    many = names.names(20_000)
    assert many[:60] == text.NAMES and len(set(many)) == 20_000
    assert all(name.isascii() and name.isalpha() and name.istitle() for name in many)
    assert names.names(61)[60] == many[60]
    for name in many[60:]:  # consonant, vowel, consonant, vowel, ending: pronounceable
        assert re.fullmatch(r"([bdfgklmnprstvz][aeiou]){2}[a-z]{3}", name.lower())
    with pytest.raises(ValueError, match="names=100000: at most 29460 can be made"):
        names.names(100_000)


# --------------------------------------------------------------------------------------------- streams and the command
def test_stream_is_deterministic_and_ends_with_the_last_puzzle():
    assert some(3, 40) == some(3, 40) != some(3, 40, seed=8)
    assert some(3, 40)[:10] == some(3, 10)
    everything = list(iter_puzzles(2, seed=0, names=2, split="test"))
    assert len(everything) == count_available(2, 2, "test") == 2 * count_solvable(2, "test") == 124


def test_counts_are_those_of_enumeration_and_of_the_docstring():
    every = list(itertools.product((False, True), repeat=2))
    said = [list(all_statements(speaker, 2)) for speaker in (0, 1)]
    solvable = [statements for statements in itertools.product(*said) if len(solutions(statements)) == 1]
    assert count_solvable(2) == len(solvable)
    meanings = {
        min(
            tuple(tuple(holds(s, roles) for roles in every) for s in relabelled(statements, new))
            for new in ((0, 1), (1, 0))
        )
        for statements in solvable
    }
    assert count_solvable(2, None, "class") == len(meanings)
    counts = [
        f"{count:,}"
        for counted in (
            [count_solvable(2, split, "class") for split in ("train", "test", None)],
            [count_solvable(2, split) for split in ("train", "test", None)],
            [count_available(2, 60, split) for split in ("train", "test", None)],
        )
        for count in counted
    ]
    (line,) = (line for line in generate.__doc__.splitlines() if line.strip().startswith("2  "))
    assert line.replace("/", " ").split() == ["2", *counts]


@pytest.mark.parametrize("workers", [2, 3])
def test_files_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    arguments = ["--people", "3,15", "--per-size", 2500, "--test-per-size", 150, "--roles", "all"]
    assert run(tmp_path / "one", *arguments) == run(tmp_path / "many", *arguments, "--workers", workers) == 0
    assert files(tmp_path / "one") == files(tmp_path / "many")


def test_files_do_not_depend_on_other_sizes_or_counts(folder, tmp_path):
    run(tmp_path, "--people", 3, "--per-size", 90, "--test-per-size", 5, "--seed", 5)
    for split, lines in (("train", 60), ("test", 5)):
        name = f"{split}/people3.jsonl"
        assert (tmp_path / name).read_text().splitlines()[:lines] == (folder / name).read_text().splitlines()[:lines]
    assert set(files(folder)) == {f"{split}/people{n}.jsonl" for split in ("train", "test") for n in (2, 3, 4)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"train/people3.jsonl": 30, "test/people3.jsonl": 10}),
        (["--split"], {"train/people3.jsonl": 30, "test/people3.jsonl": 10}),
        (["--split", "train"], {"train/people3.jsonl": 30}),
        (["--split", "test"], {"test/people3.jsonl": 10}),
        (["--split", "none"], {"people3.jsonl": 30}),
        (["--depth", "3", "--width", "3", "--no-cot"], {"train/people3.jsonl": 30, "test/people3.jsonl": 10}),
    ],
)
def test_split_says_which_files(tmp_path, arguments, expected):
    assert run(tmp_path, "--people", 3, "--per-size", 30, "--test-per-size", 10, *arguments) == 0
    assert {name: content.count(b"\n") for name, content in files(tmp_path).items()} == expected
    assert all([row["index"] for row in read(tmp_path / name)] == list(range(k)) for name, k in expected.items())


def test_the_command_says_how_many_were_rejected(tmp_path, capsys):
    assert run(tmp_path, "--people", 2, "--per-size", 24, "--test-per-size", 8, "--distinct", "class") == 0
    said = capsys.readouterr().out.replace(",", "")
    drawn, *rejected = map(int, re.findall(r"(\d+) (?:drawn|without|of a side|on neither|repeated)", said))
    assert said.startswith("people2: 24 train 8 test of ")
    assert drawn == 24 + 8 + sum(rejected) and len(rejected) == 4 and min(rejected[0], rejected[3]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--people", "2", "--names", "2", "--per-size", "5000"],
            "people=2: 5000 train puzzles asked for, but with 2 names only 402 distinct ones exist; ask for fewer, or ",
        ),
        (
            ["--people", "2", "--distinct", "class", "--test-per-size", "9", "--per-size", "3"],
            "people=2: 9 test puzzles asked for, but only 8 distinct classes exist",
        ),
        (["--people", "1-3"], "people=1: a puzzle needs at least 2 people"),
        (["--people", "0"], "people=0: a puzzle needs at least 2 people"),
        (["--people", "61", "--names", "60"], "names=60: 61 people need as many names; raise it to at least 61"),
        (["--people", "5-2"], "--people 5-2: write sizes like 2-5"),
        (["--people", "3", "--frames", "0"], "frames=0: must be from 1 to 8"),
        (["--people", "3", "--per-size", "-1"], "--per-size -1: must be at least 0"),
        (["--people", "3", "--workers", "0"], "--workers 0: must be at least 1"),
        (["--people", "3", "--width", "7"], "width=7: must be from 2 to 5"),
        (["--people", "3", "--roles", "saint"], "--roles saint: write two words"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(arguments, message, tmp_path, capsys):
    assert run(tmp_path, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_a_supply_that_cannot_be_counted_ends_with_an_error(tmp_path, capsys):
    """Nested three deep, two people's statements cannot be listed, but their classes do run out."""
    options = ["--depth", 3, "--distinct", "class", "--names", 2, "--no-cot"]
    assert run(tmp_path, "--people", 2, "--per-size", 10_000, "--test-per-size", 0, *options) == 1
    assert re.search(r"10000 distinct train puzzles asked for, but \d+ were found, none", capsys.readouterr().err)
    assert not files(tmp_path)


def test_options_of_the_grammar_hold():
    rows = some(5, 60, grammar=Grammar(depth=3, width=3, constants=False, repeats=False))
    statements = [s for puzzle in statements_of(rows) for s in puzzle]
    assert max(map(depth, statements)) == 3
    assert not any(is_constant(s) or len(people_named(s)) != len(set(people_named(s))) for s in statements)


def test_seen_is_a_set():
    rng = np.random.default_rng(0)
    seen, known = stream.Seen(), set()
    for _ in range(200):
        batch = rng.integers(0, 3000, rng.integers(0, 40)).astype(np.uint64)
        expected = []
        for value in batch.tolist():
            expected.append(value not in known)
            known.add(value)
        assert seen.new(batch).tolist() == expected
    assert sum(map(len, seen.runs)) == len(known) and len(seen.runs) < 12


# ---------------------------------------------------------------------------------------- faults of other generators
def truth_tables(statements):
    every = list(itertools.product((False, True), repeat=len(statements)))
    return tuple(tuple(holds(statement, roles) for roles in every) for statement in statements)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_fault_isomorphic_puzzles_on_both_sides_of_the_split(n):
    """At n=3, 54 of 100 published test puzzles are relabelled training puzzles; 16 have the same truth tables."""
    train = statements_of(some(n, 900, split="train", seed=1)) + statements_of(some(n, 300, split="train", seed=2))
    test = statements_of(some(n, 100 if n > 2 else 62, split="test", seed=1))
    said, meant = set(train), {truth_tables(statements) for statements in train} if n < 5 else set()
    for statements in test if n < 5 else test[:40]:
        for new in itertools.permutations(range(n)):
            assert relabelled(statements, new) not in said
            assert n == 5 or truth_tables(relabelled(statements, new)) not in meant


@pytest.mark.parametrize("n", range(2, 15))
def test_fault_isomorphic_puzzles_at_any_number_of_people(n):
    train, test = (statements_of(some(n, 400, split=split, cot=False)) for split in ("train", "test"))
    assert {canonical(statements) for statements in train}.isdisjoint(canonical(statements) for statements in test)


def test_fault_failures_are_silent(tmp_path, capsys):
    """A wrong count was written without a word: here all that were asked for, or an error and no file."""
    assert run(tmp_path / "enough", "--people", 2, "--per-size", 201, "--names", 2, "--test-per-size", 62) == 0
    assert [content.count(b"\n") for content in files(tmp_path / "enough").values()] == [62, 201]
    assert run(tmp_path / "too many", "--people", 2, "--per-size", 403, "--names", 2) == 1
    assert "only 402 distinct ones exist" in capsys.readouterr().err
    assert not (tmp_path / "too many").exists()


@pytest.mark.parametrize("n", [-1, 0, 1])
def test_fault_one_person_hangs_for_ever(n):
    with pytest.raises(ValueError, match=f"people={n}: a puzzle needs at least 2 people"):
        next(iter_puzzles(n, seed=0))


@pytest.mark.parametrize("n", [52, 61])
def test_fault_more_people_than_names_raise(n):
    (row,) = some(n, 1)
    assert len(set(row["names"])) == n
    statements = ast.literal_eval(row["statements"])
    assert [holds(statement, tuple(row["solution"])) for statement in statements] == row["solution"]


def test_fault_statements_that_say_nothing():
    """8.6 % of published statements at n=3 contradict themselves, 4.6 % are tautologies, 17 % name somebody twice."""

    def shares(**options):
        shares = collections.Counter()
        statements = [s for puzzle in statements_of(some(3, 1500, cot=False, **options)) for s in puzzle]
        for statement in statements:
            truths = {holds(statement, roles) for roles in itertools.product((False, True), repeat=3)}
            shares["contradiction" if truths == {False} else "tautology" if truths == {True} else "fine"] += 1
            shares["twice"] += len(people_named(statement)) > len(set(people_named(statement)))
        return [shares[key] / len(statements) for key in ("contradiction", "tautology", "twice")]

    assert shares() == pytest.approx([0.086, 0.046, 0.17], abs=0.02)  # the published grammar is the default
    without_constants = shares(grammar=Grammar(constants=False))
    assert without_constants[:2] == [0, 0] and without_constants[2] > 0
    assert shares(grammar=Grammar(repeats=False)) == [0, 0, 0]


def test_fault_neighbouring_seeds_share_their_puzzles():
    """Item i+1 of seed s was item i of seed s+1."""
    streams = [{row["quiz"] for row in some(5, 400, seed=seed, cot=False)} for seed in range(4)]
    assert sum(map(len, streams)) == len(set.union(*streams)) == 1600
    puzzles = [set(map(canonical, statements_of(some(5, 400, seed=seed, cot=False)))) for seed in range(4)]
    assert len(set.union(*puzzles)) > 1590


def test_fault_puzzles_repeat():
    rows = some(2, 3000, names=4)
    assert len({(row["statements"], *row["names"]) for row in rows}) == 3000
    once = statements_of(some(3, 400, distinct="class"))
    orbits = {min(relabelled(s, new) for new in itertools.permutations(range(3))) for s in once}
    assert len(orbits) == len({canonical(s) for s in once}) == 400


def test_fault_said_that_If():
    for n, options in itertools.product((2, 4), ({}, {"grammar": Grammar(3, 3)})):
        for row in some(n, 200, cot=True, **options):
            for sentence in (row["quiz"], *row["cot_repeat_steps"]):
                assert not re.search(r'[a-z,] If\b|[a-z,] It is not\b|"if\b|\. if\b|"it is not', sentence)


def test_fault_names_with_spaces_or_accents_break_the_line(monkeypatch):
    people = ["Ana María", "Jean-Luc", 'Bo "The {Ox}"']
    monkeypatch.setattr(chunks, "names", lambda count: tuple(people[:count]))
    chunks._renderer.cache_clear()
    try:
        for grammar in (Grammar(), Grammar(3, 2)):
            chunk = chunks.make_chunk(chunks.Spec(3, 1, names=3, grammar=grammar), 0)
            for line in chunk.lines(np.arange(30)):
                row = json.loads(line + "0}")
                assert set(row["names"]) == set(people)
                assert all(f"{name} is a " in row["solution_text"] and name in row["quiz"] for name in people)
    finally:
        chunks._renderer.cache_clear()
