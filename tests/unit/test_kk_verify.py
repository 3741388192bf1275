"""kk.verify finds every kind of fault, where it is, and nothing in sound files."""

import ast
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kk import dataset, generate, verify, verify_rows
from kk.generate import iter_puzzles
from kk.puzzle import random_statements
from kk.second_solver import truth
from tests.unit.kk_reference import holds, solutions


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    out = tmp_path_factory.mktemp("kk")
    options = ["--people", "2-5,14", "--per-size", "40", "--test-per-size", "15", "--roles", "all"]
    assert generate.main([*options, "--out", str(out)]) == 0
    return out


@pytest.fixture
def rows():
    return list(itertools.islice(iter_puzzles(3, seed=2, split="train", distinct="class"), 6))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def check(capsys, *paths):
    """(exit code, summary, faults)."""
    code = verify.main([*map(str, paths)])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err.splitlines()


def test_generated_files_are_sound(sound, capsys):
    files = sorted(sound.rglob("*.jsonl"))
    code, summary, faults = check(capsys, *files)
    assert (code, summary["ok"], summary["rows"], faults) == (0, True, 5 * 55, [])
    assert summary["people"] == {str(n): 55 for n in (2, 3, 4, 5, 14)}
    assert summary["files"] == {str(path): 40 if "train" in str(path) else 15 for path in files}
    assert summary["faults"] == {}


def test_parquet_files_are_sound_and_their_rows_say_their_side(tmp_path, capsys):
    generate.main(["--people", "2-4", "--per-size", "30", "--test-per-size", "10", "--out", str(tmp_path)])
    dataset.main(["--in", str(tmp_path), "--out", str(tmp_path / "parquet")])
    capsys.readouterr()
    code, summary, faults = check(capsys, *sorted((tmp_path / "parquet").glob("*.parquet")))
    assert (code, summary["rows"], faults) == (0, 120, [])
    twice = [tmp_path / "parquet/train.parquet", *sorted((tmp_path / "train").glob("*.jsonl"))]
    code, summary, faults = check(capsys, *twice)
    assert code == 1 and summary["faults"] == {"duplicate": 90}


def test_published_rows_without_our_columns(tmp_path, rows, capsys):
    """Rows as others publish them: the ground truth as an object, nothing beside it; no solution_text."""
    truth = {key: rows[0][key] for key in ("solution_text_format", "statements")}
    published = [
        {"reward_model": {"style": "rule", "ground_truth": truth}, "extra_info": {"split": "test", "index": 0}},
        {key: rows[1][key] for key in ("quiz", "names", "solution", "solution_text_format", "statements", "index")},
    ]
    code, summary, _ = check(capsys, write(tmp_path / "a.jsonl", published))
    assert (code, summary["rows"]) == (0, 2)


def flipped(row):
    """The row with the opposite solution everywhere."""
    swap = {"knight": "knave", "knave": "knight"}
    texts = {
        key: re.sub("knight|knave", lambda m: swap[m[0]], row[key]) for key in ("solution_text", "solution_text_format")
    }
    return {**row, **texts, "solution": [not role for role in row["solution"]]}


def with_statements(row, wanted):
    """The row with other statements, that have `wanted` solutions besides."""
    statements = list(ast.literal_eval(row["statements"]))
    for i, person, role in itertools.product(range(3), range(3), ("telling-truth", "lying")):
        changed = (*statements[:i], (role, person), *statements[i + 1 :])
        if wanted(solutions(changed)):
            return {**row, "statements": repr(changed)}
    return None


FAULTS = {
    "wrong": (flipped, "the listed solution is wrong: the knights are "),
    "unreadable": (lambda row: '{"quiz": ', "not JSON"),
    "schema": (lambda row: {**row, "statements": row["statements"].replace("lying", "liar")}, "is no statement"),
    "schema, not a tuple": (lambda row: {**row, "statements": "os.getcwd()"}, "not the text of nested tuples"),
    "schema, people": (lambda row: {**row, "statements": "(('lying', 1), ('lying', 0))"}, "2 statements of 3 people"),
    "schema, nothing": (lambda row: {"quiz": row["quiz"]}, "neither statements nor a reward_model.ground_truth"),
    "schema, words": (lambda row: {**row, "knight_knave": {"knight": "knight"}}, "without a_knight and a_knave"),
    "schema, text": (lambda row: {**row, "quiz": 3}, "quiz is 3, not a text"),
    "text": (lambda row: {**row, "names": row["names"][::-1]}, "disagrees with solution_text_format"),
    "text, solution": (lambda row: {**row, "solution": [not r for r in row["solution"]]}, "solution "),
    "text, words": (lambda row: {**row, "solution_text": flipped(row)["solution_text"]}, "solution_text does not say"),
    "text, quiz": (lambda row: {**row, "quiz": row["quiz"].replace(row["names"][1], "?")}, "quiz does not speak of"),
    "text, listing": (
        lambda row: {**row, "solution_text_format": row["solution_text_format"].replace("(2)", "(3)")},
        "as line 2",
    ),
    "unsolvable": (lambda row: with_statements(row, lambda found: not found), "no solution"),
    "ambiguous": (
        lambda row: with_statements(row, lambda found: len(found) > 1 and tuple(row["solution"]) in found),
        "more than one solution",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_row(tmp_path, rows, capsys, name):
    make, message = FAULTS[name]
    kind = name.split(",")[0]
    place, bad = next((i, bad) for i, row in enumerate(rows) if (bad := make(row)) is not None)
    path = write(tmp_path / "puzzles.jsonl", [*rows[:place], bad, *rows[place + 1 :]])
    code, summary, faults = check(capsys, path)
    assert (code, summary["ok"], summary["faults"]) == (1, False, {kind: 1})
    (line,) = faults
    assert line.startswith(f"{path}:{place + 1}: {kind}: ") and message in line


def test_a_puzzle_that_stands_twice(tmp_path, rows, capsys):
    path = write(tmp_path / "puzzles.jsonl", [*rows, rows[2]])
    code, summary, faults = check(capsys, path)
    assert (code, summary["faults"]) == (1, {"duplicate": 1})
    assert faults == [f"{path}:7: duplicate: the same statements and names as {path}:3"]


def moved(row, new):
    """The row with its people in another order: the same puzzle to whoever reads it."""

    def renamed(part):
        return tuple(map(renamed, part)) if isinstance(part, tuple) else new[part] if isinstance(part, int) else part

    order = [new.index(i) for i in range(len(new))]
    statements = renamed(ast.literal_eval(row["statements"]))
    names = [row["names"][i] for i in order]
    solution = [row["solution"][i] for i in order]
    listing = "\n".join(
        f"({k}) {n} is a {'knight' if s else 'knave'}" for k, (n, s) in enumerate(zip(names, solution), 1)
    )
    changed = {"names": names, "solution": solution, "solution_text_format": listing}
    return {**row, **changed, "statements": repr(tuple(statements[i] for i in order))}


def test_isomorphic_leaks_between_sides(tmp_path, rows, capsys):
    train = write(tmp_path / "train/people3.jsonl", rows)
    test = write(
        tmp_path / "test/people3.jsonl",
        [*itertools.islice(iter_puzzles(3, 2, split="test"), 4), moved(rows[4], [2, 0, 1])],
    )
    code, summary, faults = check(capsys, test, train)  # in any order
    assert (code, summary["faults"]) == (1, {"leak": 1})
    assert faults == [f"{test}:5: leak: isomorphic to {train}:5, which is on another side than test"]
    # The same within a side is no fault, but it is counted.
    code, summary, _ = check(capsys, train, write(tmp_path / "more/train.jsonl", [moved(rows[4], [2, 0, 1])]))
    assert (code, summary["isomorphic_within_a_side"]) == (0, 1)


def test_files_that_do_not_say_their_side_are_sides_of_their_own(tmp_path, rows, capsys):
    one, other = (write(tmp_path / f"{name}.jsonl", rows[:2]) for name in ("one", "other"))
    code, summary, _ = check(capsys, one, other)
    assert (code, summary["faults"]) == (1, {"leak": 2})


@pytest.mark.parametrize(
    ("path", "split", "side"),
    [
        ("train/people3.jsonl", None, "train"),
        ("kk/test.parquet", None, "test"),
        ("train/test.jsonl", None, "test"),
        ("data/people3_test_v2.jsonl", None, "test"),
        ("test_run/a.jsonl", None, "test_run/a.jsonl"),
        ("contest/trained.jsonl", None, "contest/trained.jsonl"),
        ("data/train.parquet", "test", "test"),
    ],
)
def test_sides(path, split, side):
    assert verify.side_of(Path(path), split) == side


def test_other_words_for_the_same_are_a_leak(tmp_path, capsys):
    puzzle = (("->", ("lying", 1), ("lying", 2)), ("telling-truth", 2), ("and", ("lying", 0), ("lying", 1)))
    same = (("or", ("lying", 2), ("telling-truth", 1)), *puzzle[1:])
    assert solutions(puzzle) == solutions(same) and len(solutions(puzzle)) == 1
    (solution,) = solutions(puzzle)
    listing = "\n".join(
        f"({k}) {n} is a {'knight' if s else 'knave'}" for k, (n, s) in enumerate(zip("ABC", solution), 1)
    )
    for name, statements in (("train", puzzle), ("test", same)):
        write(tmp_path / f"{name}.jsonl", [{"solution_text_format": listing, "statements": repr(statements)}])
    code, summary, _ = check(capsys, tmp_path / "train.jsonl", tmp_path / "test.jsonl")
    assert (code, summary["faults"]) == (1, {"leak": 1})


@pytest.mark.parametrize("n", [2, 3, 4])
def test_leaks_are_truth_tables_that_are_equal_after_relabelling(tmp_path, capsys, n):
    """Against all n! relabellings, on rows split without any care."""
    rows = list(itertools.islice(iter_puzzles(n, seed=1, cot=False), 240))
    write(tmp_path / "train.jsonl", rows[:200])
    write(tmp_path / "test.jsonl", rows[200:])
    every = list(itertools.product((False, True), repeat=n))
    orders = list(itertools.permutations(range(n)))

    def tables(row, new):
        statements = ast.literal_eval(moved(row, new)["statements"])
        return tuple(tuple(holds(statement, roles) for roles in every) for statement in statements)

    known = {tables(row, range(n)) for row in rows[:200]}
    leaks = sum(any(tables(row, list(new)) in known for new in orders) for row in rows[200:])
    assert check(capsys, tmp_path / "train.jsonl", tmp_path / "test.jsonl")[1]["faults"].get("leak", 0) == leaks
    assert leaks > 0 or n == 4


def test_names_may_have_spaces_and_accents(tmp_path, rows, capsys):
    people = {name: new for name, new in zip(rows[0]["names"], ["Ana María", "Jean-Luc", "Ana"])}
    text = json.dumps(rows[0])
    for name, new in people.items():
        text = re.sub(rf"\b{name}\b", json.dumps(new)[1:-1].replace("\\", "\\\\"), text)
    assert check(capsys, write(tmp_path / "names.jsonl", [text]))[0] == 0


def test_only_so_many_faults_are_printed(tmp_path, rows, capsys):
    path = write(tmp_path / "puzzles.jsonl", map(flipped, rows))
    assert verify.main([str(path), "--max-faults", "2"]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[2:] == ["and 4 more faults; --max-faults shows them"]
    assert json.loads(said.out)["faults"] == {"wrong": 6}


@pytest.mark.parametrize("name", ["absent.jsonl", "puzzles.csv", "folder"])
def test_files_that_cannot_be_read(tmp_path, capsys, name):
    if name == "puzzles.csv":
        write(tmp_path / name, [])
    if name == "folder":
        (tmp_path / name).mkdir()
    assert verify.main([str(tmp_path / name)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and name in line


def test_the_command(sound):
    command = [sys.executable, "-m", "kk.verify", str(sound / "test/people4.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"] == 15 and done.stderr == ""


def test_three_valued_truth_is_what_all_completions_agree_on():
    """...or None; for a statement that names nobody twice it is exactly that."""
    rng, decided = random.Random(0), 0
    for _ in range(400):
        statement = random_statements(rng, 3)[0]
        known = [rng.choice((None, False, True)) for _ in range(3)]
        completions = itertools.product(*((False, True) if role is None else (role,) for role in known))
        values = {holds(statement, roles) for roles in completions}
        value = truth(statement, known)
        assert value is None or values == {value}
        decided += value is not None
    assert decided > 100


def test_a_verified_file_with_a_row_of_each_size(sound):
    for path in sorted((sound / "train").glob("*.jsonl")):
        row = json.loads(path.read_text().splitlines()[0])
        puzzle = verify_rows.read_puzzle(row)
        verify_rows.check_puzzle(puzzle)
        assert (puzzle.names, puzzle.solution) == (row["names"], row["solution"])
