"""Generated puzzles and the parquet files made of them."""

import ast
import itertools
import json
import re

import pyarrow.parquet as pq
import pytest

from kk import dataset, generate, text
from kk.generate import iter_puzzles

FIELDS = {
    "quiz", "names", "knight_knave", "solution", "solution_text", "solution_text_format", "statements", "index",
}  # fmt: skip


def holds(statement, knights):
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return knights[parts[0]] == (kind == "telling-truth")
    values = [holds(part, knights) for part in parts]
    if kind == "not":
        return not values[0]
    left, right = values
    return {"and": left and right, "or": left or right, "->": not left or right, "<=>": left == right}[kind]


def brute_force(statements):
    every = itertools.product((False, True), repeat=len(statements))
    return {knights for knights in every if all(holds(s, knights) == k for s, k in zip(statements, knights))}


def relabel(part, new):
    """A statement, or a tuple of them, when person i is called new[i]."""
    if isinstance(part, tuple):
        return tuple(relabel(inner, new) for inner in part)
    return new[part] if isinstance(part, int) else part


def relabelled(statements, new):
    renamed = relabel(statements, new)
    return tuple(renamed[new.index(person)] for person in range(len(new)))


def some(n, count, **options):
    return list(itertools.islice(iter_puzzles(n, **{"seed": 7, **options}), count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("kk")
    generate.main(["--people", "2-4", "--per-size", "60", "--test-per-size", "20", "--seed", "5", "--out", str(out)])
    return out


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_rows_have_the_published_fields_and_one_solution(n):
    for index, row in enumerate(some(n, 25)):
        assert set(row) == FIELDS and row["index"] == index
        assert len(set(row["names"])) == len(row["solution"]) == n
        assert brute_force(ast.literal_eval(row["statements"])) == {tuple(row["solution"])}
        lines = [
            f"({i}) {name} is a {'knight' if is_knight else 'knave'}"
            for i, (name, is_knight) in enumerate(zip(row["names"], row["solution"], strict=True), 1)
        ]
        assert row["solution_text_format"] == "\n".join(lines)
        assert re.findall(r"\w+ is a \w+", row["solution_text"]) == [line.split(") ")[1] for line in lines]


def test_quiz_is_english():
    for row in some(4, 300):
        quiz = row["quiz"]
        assert f"You meet 4 inhabitants: {', '.join(row['names'][:3])}, and {row['names'][3]}. " in quiz
        assert quiz.endswith(" So who is a knight and who is a knave?")
        assert not re.search(r'[a-z,] If\b|"if\b|\. if\b|[{}]|  |\.\.|""', quiz)
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
    ],
)
def test_claims_in_words(statement, words):
    assert text.claim_text(statement, ["Zoey", "Sam"]) == words


def test_names_are_distinct_words():
    assert len(set(text.NAMES)) == len(text.NAMES) == 60
    assert all(name.isascii() and name.isalpha() and name.istitle() for name in text.NAMES)


def test_few_names_and_frames():
    rows = some(3, 200, names=4, frames=2)
    assert {name for row in rows for name in row["names"]} == set(text.NAMES[:4])
    assert all("told you" in row["quiz"] or "said" in row["quiz"] for row in rows)
    assert not any("remarked" in row["quiz"] or "words" in row["quiz"] for row in rows)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_no_test_puzzle_is_a_relabelled_training_puzzle(n):
    def puzzles(split, seed):
        return {ast.literal_eval(row["statements"]) for row in some(n, 200, split=split, seed=seed)}

    training = puzzles("train", 1) | puzzles("train", 2)  # seeds may differ: the split does not depend on them
    relabellings = list(itertools.permutations(range(n)))
    for statements in itertools.islice(sorted(puzzles("test", 2)), 60 if n < 6 else 20):
        assert not any(relabelled(statements, new) in training for new in relabellings)


def test_no_row_twice():
    rows = some(2, 3000, names=4)
    assert len({(row["statements"], *row["names"]) for row in rows}) == 3000


def test_stream_is_deterministic_and_ends_with_the_last_puzzle():
    assert some(3, 40) == some(3, 40) != some(3, 40, seed=8)
    assert some(3, 40)[:10] == some(3, 10)
    everything = list(iter_puzzles(2, seed=0, names=2, split="test"))
    assert len(everything) == generate.count_available(2, 2, "test") == 2 * generate.count_solvable(2, "test")


def test_files_do_not_depend_on_other_sizes(folder, tmp_path):
    generate.main(["--people", "3", "--per-size", "60", "--test-per-size", "20", "--seed", "5", "--out", str(tmp_path)])
    for split in ("train", "test"):
        assert (tmp_path / split / "people3.jsonl").read_bytes() == (folder / split / "people3.jsonl").read_bytes()
    written = {str(path.relative_to(folder)) for path in folder.rglob("*.jsonl")}
    assert written == {f"{split}/people{n}.jsonl" for split in ("train", "test") for n in (2, 3, 4)}
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--people", "2", "--names", "2", "--per-size", "5000"], r"with 2 names only \d+ distinct ones exist"),
        (["--people", "1-3"], "no puzzle of fewer than 2 people"),
        (["--people", "61"], "names=60: must be from people=61 to 60"),
        (["--people", "5-2"], "write sizes like 2-5"),
        (["--people", "3", "--frames", "0"], "frames=0"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate.main([*arguments, "--out", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_parquet(folder, tmp_path):
    options = ["--in", str(folder), "--instruction", "Think first.", "--system", "You reason."]
    dataset.main([*options, "--out", str(tmp_path)])
    for split, per_size in (("train", 60), ("test", 20)):
        file = pq.ParquetFile(tmp_path / f"{split}.parquet")
        assert file.schema_arrow.remove_metadata() == dataset.SCHEMA
        rows = file.read().to_pylist()
        assert [row["data_source"] for row in rows] == [f"kk_logic_{n}" for n in (2, 3, 4) for _ in range(per_size)]
        assert file.schema_arrow.metadata[b"fingerprint"].decode() == dataset.fingerprint(rows)
        for row in rows:
            info, judged = row["extra_info"], json.loads(row["reward_model"]["ground_truth"])
            assert row["prompt"] == [
                {"role": "system", "content": "You reason."},
                {"role": "user", "content": info["quiz"] + " Think first."},
            ]
            assert (row["ability"], row["reward_model"]["style"], info["split"]) == ("logic", "rule", split)
            assert brute_force(ast.literal_eval(judged["statements"])) == {tuple(info["solution"])}
            assert judged["solution_text_format"] == text.solution_text_format(info["solution"], info["names"])
            assert info["depth"] in (1, 2)


def test_parquet_without_extras_has_one_message_and_row_groups(tmp_path):
    rows = [dataset.to_row(puzzle, "train") for puzzle in some(2, 1500)]
    assert rows[0]["prompt"] == [{"role": "user", "content": rows[0]["extra_info"]["quiz"]}]
    mark = dataset.write_parquet(rows, tmp_path / "train.parquet")
    assert pq.ParquetFile(tmp_path / "train.parquet").num_row_groups == 2
    assert mark == dataset.write_parquet(rows, tmp_path / "again.parquet") != dataset.fingerprint(rows[::-1])


def test_dataset_without_puzzles_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        dataset.main(["--in", str(tmp_path), "--out", str(tmp_path)])
    assert "python -m kk.generate" in capsys.readouterr().err
