"""Parquet files of puzzles: what is in them, how they are written, and what is refused on the way in."""

import ast
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kk import dataset, generate, importing, text
from kk.files import Unread, read_rows
from kk.parquet import RowWriter, fingerprint, write_parquet, writing
from kk.rows import COT_SCHEMA, SCHEMA, to_row
from megatron_dump.data import PromptDataset
from megatron_dump.rewards import reward_fn
from tests.unit.kk_reference import solutions

SYSTEM = "You are an assistant. Answer within <answer> </answer> tags, i.e., <answer> (1) Zoey is a knight\n </answer>."
OPEN = f"<|im_start|>system\n{SYSTEM}\n<|im_end|>\n<|im_start|>user\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("kk")
    generate.main(["--people", "2-4", "--per-size", "60", "--test-per-size", "20", "--seed", "5", "--out", str(out)])
    return out


def puzzle(**changed):
    """A published puzzle as its JSON line has it."""
    statements = (("lying", 1), ("and", ("telling-truth", 0), ("telling-truth", 1)))
    row = {
        "quiz": 'You meet 2 inhabitants: Zoey, and Sam. Zoey noted, "Sam is a knave". Sam noted, "Zoey is a knight and '
        'Sam is a knight". So who is a knight and who is a knave?',
        "names": ["Zoey", "Sam"],
        "knight_knave": text.KNIGHT_KNAVE,
        "solution": [True, False],
        "solution_text": "Zoey is a knight, and Sam is a knave.",
        "solution_text_format": "(1) Zoey is a knight\n(2) Sam is a knave",
        "cot_head": "Let's think.",
        "cot_repeat_steps": ["Assume Zoey is a knight.", "Then Sam is a knave."],
        "cot_foot": "That fits.",
        "statements": repr(statements),
        "index": 7,
    }
    return {**row, **changed}


def published(content=None, *, truth=None, info=None, **columns):
    """A row of a published parquet file; `content` is the user's message."""
    row = puzzle()
    truth = truth or json.dumps({key: row[key] for key in ("solution_text_format", "statements")})
    return {
        "prompt": [{"role": "user", "content": OPEN + row["quiz"] + "\n" if content is None else content}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "test", "index": 3, "quiz": row["quiz"], **(info or {})},
        **columns,
    }


def write_rows(path, *rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def run(capsys, *arguments):
    """Exit code and what was said to stdout and stderr."""
    code = dataset.main([str(word) for word in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def read(path):
    return pq.read_table(path).to_pylist()


def test_rows_of_generated_puzzles(folder, tmp_path):
    options = ["--in", str(folder), "--instruction", "Think first.", "--system", "You reason."]
    assert dataset.main([*options, "--out", str(tmp_path)]) == 0
    for split, per_size in (("train", 60), ("test", 20)):
        file = pq.ParquetFile(tmp_path / f"{split}.parquet")
        assert file.schema_arrow.remove_metadata() == SCHEMA
        rows = file.read().to_pylist()
        assert [row["data_source"] for row in rows] == [f"kk_logic_{n}" for n in (2, 3, 4) for _ in range(per_size)]
        assert file.schema_arrow.metadata[b"fingerprint"].decode() == fingerprint(rows)
        for row in rows:
            info, judged = row["extra_info"], json.loads(row["reward_model"]["ground_truth"])
            assert row["prompt"] == [
                {"role": "system", "content": "You reason."},
                {"role": "user", "content": info["quiz"] + " Think first."},
            ]
            assert (row["ability"], row["reward_model"]["style"], info["split"]) == ("logic", "rule", split)
            assert solutions(ast.literal_eval(judged["statements"])) == {tuple(info["solution"])}
            assert judged["solution_text_format"] == text.solution_text_format(info["solution"], info["names"])
            assert info["depth"] in (1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]


def test_the_trainer_reads_the_files_and_the_reward_judges_them(folder, tmp_path):
    dataset.main(["--in", str(folder), "--out", str(tmp_path), "--cot"])
    data = PromptDataset(str(tmp_path / "train.parquet"), encode=lambda messages: list(messages[0]["content"].encode()))
    assert data.sources == ["kk_logic_2", "kk_logic_3", "kk_logic_4"] and len(data) == 180
    judge, answers = reward_fn("kk"), read(tmp_path / "train.parquet")
    assert all(judge(row["response"], data[i].ground_truth).correct for i, row in enumerate(answers))


def test_one_side_alone(folder, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/people2.jsonl").write_bytes((folder / "test/people2.jsonl").read_bytes())
    assert dataset.main(["--in", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert len(read(tmp_path / "test.parquet")) == 20 and not (tmp_path / "train.parquet").exists()


def test_without_options_the_prompt_is_the_quiz():
    row = to_row(puzzle(), "train")
    assert row["prompt"] == [{"role": "user", "content": puzzle()["quiz"]}]
    assert row["data_source"] == "kk_logic_2"


def test_row_groups_and_fingerprint(tmp_path):
    rows = [to_row(puzzle(index=i), "train") for i in range(1500)]
    mark = write_parquet(rows, tmp_path / "train.parquet", SCHEMA)
    assert [pq.ParquetFile(tmp_path / "train.parquet").metadata.row_group(i).num_rows for i in (0, 1)] == [1024, 476]
    assert mark == fingerprint(rows) == fingerprint(read(tmp_path / "train.parquet")) != fingerprint(rows[::-1])


def test_memory_does_not_grow_with_the_rows(tmp_path):
    row = to_row(puzzle(), "train")

    def peak(count):
        tracemalloc.start()
        write_parquet((row for _ in range(count)), tmp_path / "x.parquet", SCHEMA)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)
    assert peak(12_000) < 1.5 * peak(3_000)


def test_nothing_appears_before_everything_is_written(tmp_path):
    paths = {name: tmp_path / f"{name}.parquet" for name in ("a", "b")}
    (tmp_path / "a.parquet").write_text("from before")
    with pytest.raises(RuntimeError), writing(paths, SCHEMA) as writers:
        writers["a"].add(to_row(puzzle(), "train"))
        writers["b"].finish()
        raise RuntimeError
    assert (tmp_path / "a.parquet").read_text() == "from before" and len(list(tmp_path.iterdir())) == 1
    writer = RowWriter(tmp_path / "c.parquet", SCHEMA)
    with pytest.raises(KeyError, match="has the columns data_source, not"):
        writer.add({"data_source": "x"})
    writer.discard()


@pytest.mark.parametrize("haste", ["0", "0.5"])
def test_responses_by_trial(folder, tmp_path, haste):
    arguments = ["--in", str(folder), "--cot", "--haste", haste, "--cot-max-trials", "6"]
    assert dataset.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "train.parquet")
    assert pq.read_schema(tmp_path / "train.parquet").remove_metadata() == COT_SCHEMA
    said = [(row["response"], row["reward_model"]["ground_truth"]) for row in rows if row["response"]]
    right = [reward_fn("kk")(response, truth).correct for response, truth in said]
    assert all(right) == (haste == "0") and any(right)
    for row in rows:  # trials come in the order of binary numbers, knights being zeros
        trials = 1 + sum(2**i for i, knight in enumerate(reversed(row["extra_info"]["solution"])) if not knight)
        assert (row["response"] is None) == (trials > 6)
        if row["response"] and haste == "0":
            assert row["response"].count("try") == trials
    again = tmp_path / "again"
    assert dataset.main([*arguments, "--out", str(again)]) == 0 and read(again / "train.parquet") == rows


def test_responses_of_the_puzzles_own_words(tmp_path, capsys):
    path = write_rows(tmp_path / "x.jsonl", puzzle())
    assert run(capsys, "--import", path, "--split", "train", "--cot", "steps", "--out", tmp_path)[0] == 0
    (row,) = read(tmp_path / "train.parquet")
    assert row["response"] == (
        "<think> Let's think. Assume Zoey is a knight. Then Sam is a knave. That fits. </think> "
        "<answer> (1) Zoey is a knight (2) Sam is a knave </answer>"
    )
    assert reward_fn("kk")(row["response"], row["reward_model"]["ground_truth"]).correct
    path = write_rows(tmp_path / "x.jsonl", {**puzzle(), "cot_foot": None})
    code, _, error = run(capsys, "--import", path, "--split", "train", "--cot", "steps", "--out", tmp_path)
    assert code == 1 and "x.jsonl:1: --cot steps needs the fields cot_head" in error


@pytest.mark.parametrize(
    "ending", ["", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant\n<think>"]
)
def test_published_wrapping_is_taken_off(tmp_path, capsys, ending):
    quiz = puzzle()["quiz"]
    wrapped = published(f"{OPEN}{quiz}\n{ending}", **{key: puzzle()[key] for key in ("quiz", "names", "solution")})
    path = write_rows(tmp_path / "x.parquet", wrapped)
    assert run(capsys, "--import", path, "--split", "file", "--out", tmp_path / "out")[0] == 1  # no training row
    for keep, expected in ((False, []), (True, [{"role": "system", "content": SYSTEM}])):
        options = ["--keep-system"] if keep else []
        assert run(capsys, "--import", path, "--split", "test", "--out", tmp_path, *options)[0] == 0
        (row,) = read(tmp_path / "test.parquet")
        assert row["prompt"] == [*expected, {"role": "user", "content": quiz}]
        assert row["extra_info"] == {
            "split": "test",
            "index": 3,
            "quiz": quiz,
            "depth": 2,
            "names": ["Zoey", "Sam"],
            "solution": [True, False],
        }
        assert json.loads(row["reward_model"]["ground_truth"]) == {
            key: puzzle()[key] for key in ("solution_text_format", "statements")
        }


def test_other_published_forms():
    quiz = puzzle()["quiz"]
    plain = f"The user asks a question, and the Assistant solves it.\nAs in (1) ….\n\nUser:{quiz}\nAssistant: <think>"
    truth = {key: puzzle()[key] for key in ("solution_text_format", "statements")}  # an object, in older files
    for row in (published(plain), published(truth=truth), published(quiz), published(f"{quiz} Think first.")):
        read_ = importing.imported(row)
        assert (read_.puzzle["quiz"], read_.split, read_.puzzle["index"]) == (quiz, "test", 3)
    assert importing.imported(puzzle()).split is None and importing.imported(puzzle()).puzzle["index"] == 7
    ours = to_row(puzzle(), "train", "Think first.", "You reason.")
    assert importing.imported(ours).puzzle["quiz"] == quiz and importing.imported(ours).system == "You reason."


def test_other_words_for_the_roles():
    words = {
        key: value.replace("night", "aint").replace("nave", "inner").replace("k", "s").replace("K", "S")
        for key, value in text.KNIGHT_KNAVE.items()
    }
    assert words["a_knave"] == "a sinner" and words["Knight"] == "Saint"
    swapped = json.loads(json.dumps(puzzle()).replace("knight", "saint").replace("knave", "sinner"))
    row = {**swapped, "knight_knave": words, "statements": puzzle()["statements"]}
    assert importing.imported(row).puzzle["solution"] == [True, False]
    flipped = {**text.KNIGHT_KNAVE, "a_knight": "a knave", "a_knave": "a knight"}
    row = puzzle(knight_knave=flipped, solution_text_format="(1) Zoey is a knave\n(2) Sam is a knight")
    assert importing.imported(row).puzzle["solution"] == [True, False]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1]", "a list, not a JSON object"),
        (puzzle(quiz=None), "quiz is None, not a text"),
        (puzzle(quiz="You meet Zoey. So?"), "the quiz does not speak of 'Sam'"),
        (puzzle(quiz=puzzle()["quiz"] + "\ud800"), "half of a surrogate pair"),
        (puzzle(solution_text_format="(1) Zoey is a knight\n(2) Sam is a knight"), "solution [True, False] disagree"),
        (puzzle(solution_text_format="(1) Zoey is a knight\n(3) Sam is a knave"), "where '(2) Name is a"),
        (puzzle(solution=None, solution_text_format="(1) Zoey is a knight\n(2) Sam is a knight"), "not the only one"),
        (puzzle(names=["Zoey", "Tom"]), "names ['Zoey', 'Tom'] disagree"),
        (puzzle(statements="(('telling-truth', 0),)"), "1 statements of 2 people"),
        (puzzle(statements="(('lying', 1), ('lying', 0))"), "is not the only one"),
        (puzzle(statements="(('lying', 1), ('lying', 2))"), "('lying', 2) is no statement about 2 people"),
        (puzzle(statements="(('lying', 1), ('xor', ('lying', 0), ('lying', 1)))"), "is no statement"),
        (puzzle(statements="(('lying', 1), ('lying', True))"), "is no statement"),
        (puzzle(statements="(('lying', 1), ('->', ('lying', 0)))"), "is no statement"),
        (puzzle(statements="__import__('os')"), "not the text of nested tuples"),
        (puzzle(statements="(" * 5000), "not the text of nested tuples"),
        (puzzle(statements=5), "statements is 5, not a text"),
        (puzzle(index="7"), "index is '7', not an integer"),
        (puzzle(knight_knave={"knight": "knight"}), "knight_knave is"),
        (published(extra_info=[1]), "extra_info is [1], not an object"),
        (published(OPEN + puzzle()["quiz"] + "<|im_end|>\n<|im_start|>assistant\nSure: "), "text '<|im_start|>'"),
        (published(f"<|user|>{puzzle()['quiz']}"), "template text '<|user|>'"),
        (published(f"[INST] {puzzle()['quiz']} [/INST]"), "template text '[INST]'"),
        (published(OPEN + "Another quiz?\n"), "is not the quiz of extra_info"),
        (published(puzzle()["quiz"] + " Think!", info={"quiz": None}), "an instruction? Only a quiz"),
        (published(prompt="hello"), "prompt is 'hello', not a list of messages"),
        (published(prompt=[{"role": "assistant", "content": "x"}]), "messages of ['assistant']"),
        (published(truth="x"), "ground_truth is not JSON"),
        (published(truth="[]"), "ground_truth is [], not an object"),
    ],
)
def test_what_is_not_recognised_is_refused_by_place_and_reason(row, reason, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    write_rows(path, puzzle(), row)
    code, _, error = run(capsys, "--import", path, "--split", "train", "--out", tmp_path / "out")
    assert code == 1 and error.startswith(f"error: {path}:2: ") and reason in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_bad_parquet_row_is_named_from_zero(tmp_path, capsys):
    path = write_rows(tmp_path / "x.parquet", published(), published("<|user|>What?"))
    code, _, error = run(capsys, "--import", path, "--split", "test", "--out", tmp_path / "out")
    assert code == 1 and f"{path} row 1: " in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in", "nowhere"], "no train/people<n>.jsonl or test/people<n>.jsonl in nowhere; make them"),
        (["--import", "nowhere.jsonl", "--split", "test"], "nowhere.jsonl"),
        (["--import", "{tmp}/x.csv", "--split", "test"], "only .parquet and .jsonl files can be read"),
        (["--import", "{tmp}/y.parquet", "--split", "test"], "y.parquet cannot be read as parquet"),
        (["--import", "{tmp}/x.jsonl", "--split", "file"], "x.jsonl:1: --split file, but extra_info.split is neither"),
        (["--import", "{tmp}/empty.jsonl", "--split", "class"], "no train and no test rows in"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, capsys):
    for name, content in (("x.csv", "a"), ("y.parquet", "a"), ("x.jsonl", json.dumps(puzzle())), ("empty.jsonl", "")):
        (tmp_path / name).write_text(content)
    words = [word.format(tmp=tmp_path) for word in arguments]
    code, _, error = run(capsys, *words, "--out", tmp_path / "out")
    assert code == 1 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--import", "x.jsonl"], "--import needs --split"),
        (["--in", "x", "--split", "file"], "are for --import"),
        (["--in", "x", "--haste", "2"], "--haste 2.0: a probability"),
    ],
)
def test_contradictory_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        dataset.main([*arguments, "--out", "out"])
    assert message in capsys.readouterr().err


def test_split_by_class_separates_relabelled_puzzles(tmp_path, capsys):
    rows = []
    for index, base in enumerate(generate.iter_puzzles(3, seed=3)):
        if index == 150:
            break
        order = [1, 2, 0]  # the same puzzle told from another chair
        back = [order.index(i) for i in range(3)]

        def moved(part, back=back):
            return tuple(map(moved, part)) if isinstance(part, tuple) else back[part] if isinstance(part, int) else part

        statements = ast.literal_eval(base["statements"])
        solution = [base["solution"][i] for i in order]
        names = [base["names"][i] for i in order]
        listing = text.solution_text_format(solution, names)
        turned = {"statements": repr(tuple(moved(statements[i]) for i in order)), "solution": solution, "names": names}
        rows += [{**base, "index": index}, {**base, **turned, "solution_text_format": listing, "index": index}]
    path = write_rows(tmp_path / "x.jsonl", *rows)
    assert run(capsys, "--import", path, "--split", "class", "--out", tmp_path)[0] == 0
    train, test = ([row["extra_info"]["index"] for row in read(tmp_path / f"{s}.parquet")] for s in ("train", "test"))
    assert not set(train) & set(test) and len(test) > 10
    assert all(train.count(i) == 2 for i in train) and all(test.count(i) == 2 for i in test)


KEYS = st.sampled_from(sorted(published() | puzzle()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@settings(deadline=None)
@given(VALUES)
def test_any_json_is_either_a_puzzle_or_refused(value):
    row = {**puzzle(), **value} if isinstance(value, dict) else published(prompt=value)
    try:
        assert importing.imported(row).puzzle["solution"] == [True, False]
    except Unread as reason:
        assert str(reason)


def test_rows_have_their_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a"')
    assert [(number, row if isinstance(row, dict) else "bad") for number, row in read_rows(path)] == [
        (1, {"a": 1}),
        (3, {"a": 2}),
        (4, "bad"),
    ]
    write_rows(tmp_path / "x.parquet", *({"a": i, "b": 0} for i in range(2500)))
    assert list(read_rows(tmp_path / "x.parquet", ("a",))) == [(i, {"a": i}) for i in range(2500)]
