"""tools/combine_datasets.py: what a mixture takes and leaves, and that it trains."""

import collections
import itertools
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kk import dataset, generate
from kk.parquet import fingerprint
from megatron_dump.data import PromptDataset
from megatron_dump.inputs import load_tokenizer
from megatron_dump.rewards import reward_for_source

REPO = Path(__file__).resolve().parents[2]
TOKENIZER = REPO / "examples/models/kk-tiny"
sys.path.append(str(REPO / "tools"))

import combine_datasets  # noqa: E402
from dataset_mix import mix  # noqa: E402
from dataset_mix.inputs import Row  # noqa: E402
from dataset_mix.plan import TAKEN, Rows, Rules, make_plan, normalised  # noqa: E402

MATH = ("source=math", "prompt=question", "answer=answer")


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    """A folder with train.parquet and test.parquet of puzzles of 2 and 3 people, and their JSON lines."""
    out = tmp_path_factory.mktemp("kk")
    generate.main(
        [
            "--people",
            "2-3",
            "--per-size",
            "40",
            "--test-per-size",
            "10",
            "--names",
            "8",
            "--frames",
            "1",
            "--out",
            str(out),
        ]
    )
    assert dataset.main(["--in", str(out), "--out", str(out)]) == 0
    return out


def sums(count, start=0):
    return [
        {"question": f"What is {i} plus {i}?", "answer": f"Twice {i}.\n#### {2 * i}"}
        for i in range(start, start + count)
    ]


def chat(text, answer="4", source="sums", split="train", **more):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": text}],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": 0},
        **more,
    }


def write(path, *rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(capsys, *words):
    """Exit code, what was said to stdout and stderr."""
    code = combine_datasets.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def read(folder, split="train"):
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def texts(folder, split="train"):
    return [row["prompt"][-1]["content"] for row in read(folder, split)]


def summary(folder):
    return json.loads((folder / "mixture.json").read_text())


def test_puzzles_and_mathematics_train_together(puzzles, tmp_path, capsys):
    """Schema as megatron_dump.data documents it, rows found again, ground truths that the rewards can read."""
    write(tmp_path / "math.jsonl", *sums(50))
    code, out, _ = run(
        capsys,
        "--out",
        tmp_path,
        "--input",
        puzzles / "train.parquet",
        "--input",
        puzzles / "test.parquet",
        "--input",
        tmp_path / "math.jsonl",
        *MATH,
        "answer_after=####",
        "split=0.2",
        "instruction=Think.",
        "--tokenizer",
        TOKENIZER,
        "--reward",
        "kk_*=kk",
        "math=math",
    )
    assert code == 0 and "kk_logic_2" in out and "math" in out
    tokenizer = load_tokenizer(str(TOKENIZER))

    def encode(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for split, n_kk, n_math in (("train", 40, 40), ("test", 10, 10)):
        data = PromptDataset(str(tmp_path / f"{split}.parquet"), encode=encode)
        assert collections.Counter(data.source_of_rows) == {"kk_logic_2": n_kk, "kk_logic_3": n_kk, "math": n_math}
        kk = [data[i] for i in range(len(data)) if data.source_of_rows[i] != "math"]
        alone = PromptDataset(str(puzzles / f"{split}.parquet"), encode=encode)
        for prompt, before in zip(kk, (alone[i] for i in range(len(alone))), strict=True):
            assert (prompt.source, prompt.text, prompt.ground_truth) == (
                before.source,
                before.text,
                before.ground_truth,
            )
        for i in range(len(data)):
            if data.source_of_rows[i] == "math":
                number = int(data[i].text.split()[2])
                assert data[i].text == f"What is {number} plus {number}? Think."
                assert data[i].ground_truth == str(2 * number)
        row = read(tmp_path, split)[0]
        assert pq.read_schema(tmp_path / f"{split}.parquet").remove_metadata() == mix.SCHEMA
        assert json.loads(row["extra_info"]["original"])["names"] and row["extra_info"]["index"] == 0
        assert row["extra_info"]["origin"] == f"{puzzles / split}.parquet row 0"
        statistics = summary(tmp_path)["sources"]["kk_logic_2"]
        assert statistics["longest"] >= max(len(p.token_ids) for p in kk if p.source == "kk_logic_2")
    files = summary(tmp_path)["files"]
    assert files["train"] == {"rows": 120, "sha256": fingerprint(read(tmp_path))}
    truth = data[len(data) - 1].ground_truth
    right = f"<think> so </think> <answer> {truth} </answer>"
    assert reward_for_source("math", {"math": "math"})(right, truth).correct


def test_the_published_mixture(puzzles, tmp_path, capsys):
    """JSON lines of each size; a fixed number of each size to test, the others to training."""
    for n in (2, 3):
        lines = (puzzles / "train" / f"people{n}.jsonl").read_text()
        (tmp_path / f"people{n}_num40.jsonl").write_text(lines)
    words = ["--input", tmp_path / "people*_num40.jsonl", "split=4", "--seed", "1"]
    assert run(capsys, "--out", tmp_path / "a", *words)[0] == 0
    for split, count in (("train", 36), ("test", 4)):
        rows = read(tmp_path / "a", split)
        assert collections.Counter(row["data_source"] for row in rows) == {"kk_logic_2": count, "kk_logic_3": count}
    assert not set(texts(tmp_path / "a")) & set(texts(tmp_path / "a", "test"))
    # A wrapped parquet file of the same puzzles comes to the same rows.
    wrapped = [
        {
            **row,
            "prompt": [{"role": "user", "content": f"<|im_start|>system\nS\n<|im_end|>\n<|im_start|>user\n{quiz}\n"}],
        }
        for row in read(tmp_path / "a") + read(tmp_path / "a", "test")
        for quiz in [row["prompt"][0]["content"]]
    ]
    write(tmp_path / "x.parquet", *({**row, "extra_info": {"split": "train"}} for row in wrapped))
    code, _, error = run(capsys, "--out", tmp_path / "b", "--input", tmp_path / "x.parquet", "split=4", "--seed", "1")
    assert code == 1 and "x.parquet row 0: prompt: a message has template text '<|im_start|>'" in error
    words = ["--input", tmp_path / "x.parquet", "format=kk", "split=4", "system=", "--seed", "1"]
    assert run(capsys, "--out", tmp_path / "b", *words)[0] == 0
    for split in ("train", "test"):
        assert sorted(texts(tmp_path / "b", split)) == sorted(texts(tmp_path / "a", split))


def test_splits_and_limits(tmp_path, capsys):
    write(tmp_path / "a.jsonl", *sums(200))
    write(tmp_path / "b.jsonl", *({**row, "topic": f"t{i % 3}"} for i, row in enumerate(sums(90, 1000))))
    inputs = [
        "--input",
        tmp_path / "a.jsonl",
        *MATH,
        "split=0.25",
        "--input",
        tmp_path / "b.jsonl",
        "source_column=topic",
        *MATH[1:],
        "split=7",
    ]
    assert (
        run(capsys, "--out", tmp_path, *inputs, "--limit", "t1", "train=5", "--limit", "t*", "test=3", "train=9")[0]
        == 0
    )
    counts = {
        split: collections.Counter(row["data_source"] for row in read(tmp_path, split)) for split in ("train", "test")
    }
    assert counts["train"] == {"math": 150, "t0": 9, "t1": 5, "t2": 9}
    assert counts["test"] == {"math": 50, "t0": 3, "t1": 3, "t2": 3}
    statistics = summary(tmp_path)["sources"]["t1"]
    assert {k: statistics[k] for k in ("rows", "over_limit", "train", "test")} == {
        "rows": 30,
        "over_limit": 22,
        "train": 5,
        "test": 3,
    }
    assert run(capsys, "--out", tmp_path, *inputs, "--max-train", "60", "--max-test", "20")[0] == 0
    assert len(read(tmp_path)) == 60 and len(read(tmp_path, "test")) == 20


def test_choices_depend_on_seed_and_prompts_alone(tmp_path, capsys):
    rows = sums(120)
    write(tmp_path / "a.jsonl", *rows)
    write(tmp_path / "b.jsonl", *rows[::-1])
    made = {}
    for name, file, seed in (("one", "a", 1), ("again", "a", 1), ("turned", "b", 1), ("other", "a", 2)):
        words = ["--input", tmp_path / f"{file}.jsonl", *MATH, "split=0.5", "--limit", "math", "train=30"]
        assert run(capsys, "--out", tmp_path / name, *words, "--seed", seed)[0] == 0
        made[name] = set(texts(tmp_path / name)), set(texts(tmp_path / name, "test"))
    assert made["one"] == made["again"] == made["turned"] != made["other"]
    assert (tmp_path / "one/train.parquet").read_bytes() == (tmp_path / "again/train.parquet").read_bytes()
    assert len(made["one"][0] & made["other"][0]) < 25  # other rows, not the same ones again


def test_duplicates_across_sources_and_splits(tmp_path, capsys):
    write(tmp_path / "a.parquet", chat("Is it  SO?"), chat("Two?"), chat("Three?"))
    write(
        tmp_path / "b.parquet",
        chat("is it so?", source="other"),
        chat("Two?", "5", "other"),
        chat("ＴＨＲＥＥ?\n", split="test"),
    )
    words = ["--input", tmp_path / "a.parquet", "--input", tmp_path / "b.parquet", "--out", tmp_path]
    code, out, _ = run(capsys, *words)
    assert code == 0 and texts(tmp_path) == ["Is it  SO?", "Two?"] and texts(tmp_path, "test") == ["ＴＨＲＥＥ?\n"]
    assert summary(tmp_path)["duplicates"] == {
        "rows": 3,
        "across_sources": 2,
        "training_rows_of_test_prompts": 1,
        "other_answer": 1,
        "other_answer_examples": [[f"{tmp_path / 'b.parquet'} row 1", f"{tmp_path / 'a.parquet'} row 1"]],
    }
    assert "3 repeated prompts, 2 across sources, 1 in training and test" in out
    assert run(capsys, *words, "--duplicates", "keep")[0] == 0 and len(read(tmp_path)) == 5
    code, _, error = run(capsys, *words, "--duplicates", "refuse")
    assert code == 1 and "3 prompts repeat another row's" in error


def test_long_prompts_are_left_out_by_the_trainers_count(puzzles, tmp_path, capsys):
    words = ["--input", puzzles / "*.parquet", "--tokenizer", TOKENIZER, "--out", tmp_path]
    assert run(capsys, *words)[0] == 0
    tokenizer = load_tokenizer(str(TOKENIZER))
    lengths = {t: len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts(tmp_path)}
    limit = sorted(lengths.values())[len(lengths) // 2]
    assert run(capsys, *words, "--max-prompt-length", limit)[0] == 0
    assert texts(tmp_path) == [t for t in lengths if lengths[t] <= limit]
    assert 0 < sum(of["too_long"] for of in summary(tmp_path)["sources"].values()) < 100


BAD_ROWS = [
    ('{"question": ', "not JSON"),
    ('"text"', "a str, not a JSON object"),
    ({"question": "x?"}, "no column 'answer'; there are question"),
    ({"question": "x?", "answer": None}, "answer is null or missing"),
    ({"question": "x?", "answer": " "}, "answer is empty"),
    ({"question": 5, "answer": "5"}, "question is 5, not a list of messages"),
    ({"question": [], "answer": "5"}, "question is [], not a list of messages"),
    ({"question": "", "answer": "5"}, "a message's content is '', not a text"),
    ({"question": "x\ud800?", "answer": "5"}, "half of a surrogate pair"),
    ({"question": "<|im_start|>user\nx?", "answer": "5"}, "template text '<|im_start|>'"),
    ({"question": [{"role": "bot", "content": "x"}], "answer": "5"}, "a message's role is 'bot'"),
    ({"question": [{"role": "user", "content": None}], "answer": "5"}, "a message's content is None"),
    ({"question": [{"role": "assistant", "content": "y"}], "answer": "5"}, "the last message is the assistant's"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_and_stops_everything_or_is_counted(row, reason, tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", *sums(3), row, *sums(3, 10))
    words = ["--input", path, *MATH, "split=2", "--out", tmp_path / "out"]
    code, _, error = run(capsys, *words)
    assert code == 1 and f"{path}:4: " in error and reason in error
    assert "1 of 7 rows are bad; nothing was written; mend them or --skip-bad" in error
    assert not (tmp_path / "out").exists()
    assert run(capsys, *words, "--skip-bad")[0] == 0
    assert len(read(tmp_path / "out")) == 4 and len(read(tmp_path / "out", "test")) == 2
    assert summary(tmp_path / "out")["inputs"] == {str(path): {"rows": 7, "bad": 1}}
    (example,) = summary(tmp_path / "out")["bad_examples"]
    assert example["place"] == f"{path}:4" and reason in example["reason"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat("x?", extra_info={"split": "dev", "index": 0}), "its split is 'dev', not train or test; give split=…"),
        (chat("x?", reward_model={"style": "rule", "ground_truth": None}), "reward_model.ground_truth is null"),
        (chat("x?", source=None), "data_source is null or missing"),
        (chat("x?", prompt=None), "prompt is None, not a list"),
        (chat("x?", "not of a puzzle", "kk_logic_2"), "its reward function cannot read the ground truth"),
    ],
)
def test_bad_chat_rows(row, reason, tmp_path, capsys):
    path = write(tmp_path / "x.parquet", chat("a?"), chat("b?", split="test"), row)
    words = ["--input", path, "--out", tmp_path / "out", "--reward", "kk_*=kk", "*=format"]
    code, _, error = run(capsys, *words)
    assert code == 1 and f"{path} row 2: " in error and reason in error and not (tmp_path / "out").exists()
    assert run(capsys, *words, "--skip-bad")[0] == 0
    assert (texts(tmp_path / "out"), texts(tmp_path / "out", "test")) == (["a?"], ["b?"])


def test_bad_puzzles_are_named(puzzles, tmp_path, capsys):
    lines = (puzzles / "test/people2.jsonl").read_text().splitlines()
    wrong = json.loads(lines[3])
    wrong["solution"] = [not role for role in wrong["solution"]]
    path = write(tmp_path / "x.jsonl", *lines[:3], wrong, *lines[4:])
    code, _, error = run(capsys, "--input", path, "split=2", "--out", tmp_path / "out")
    assert code == 1 and f"{path}:4: solution " in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "{tmp}/no*.jsonl"], "no such file"),
        (
            ["--input", "{tmp}/a.jsonl"],
            "a.jsonl:1: neither columns prompt and reward_model nor a puzzle; name its columns",
        ),
        (["--input", "{tmp}/a.jsonl", "sauce=x"], "'sauce=x' is none of its options: ability, answer"),
        (["--input", "{tmp}/a.jsonl", "prompt=question"], "name both columns, prompt=… and answer=…"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=half"], "split=half: write train, test, file, a share"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=1.5"], "split=1.5: write train, test, file, a share"),
        (["--input", "{tmp}/a.jsonl", *MATH, "source_column=x", "split=2"], "give either source or source_column"),
        (["--input", "{tmp}/a.jsonl", *MATH, "format=csv"], "format=csv: must be one of chat, columns, kk"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=train"], "no test rows are left, nothing was written"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=2", "--limit", "*", "train=0"], "no train rows are left"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=2", "--limit", "*"], "--limit *: write train=N, test=N or both"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=2", "--limit", "*", "dev=1"], "--limit * dev=1: write train=N"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=2", "--reward", "kk"], "--reward kk: write PATTERN=NAME"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=2", "--reward", "kk_*=kk"], "no reward function for source 'math'"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=2", "--max-prompt-length", "9"], "give --tokenizer"),
        (["--input", "{tmp}/a.jsonl", *MATH, "split=2", "--tokenizer", "{tmp}"], "no tokenizer.json there"),
        (["--input", "{tmp}/a.csv", *MATH, "split=2"], "only .parquet and .jsonl files can be read"),
        (["--input", "{tmp}/a.parquet", *MATH, "split=2"], "cannot be read as parquet"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(words, message, tmp_path, capsys):
    write(tmp_path / "a.jsonl", *sums(6))
    for name in ("a.csv", "a.parquet"):
        (tmp_path / name).write_text("a,b")
    code, _, error = run(capsys, *(word.format(tmp=tmp_path) for word in words), "--out", tmp_path / "out")
    assert code == 1 and message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_file_alone_and_words_from_a_file(tmp_path, capsys):
    write(tmp_path / "a.jsonl", *sums(6))
    options = "source='school math'  # two words\nprompt=question answer=answer split=train\n"
    (tmp_path / "words").write_text(f"--input {tmp_path}/a.jsonl {options}")
    assert run(capsys, "--out", tmp_path, "--only", "train", f"@{tmp_path / 'words'}")[0] == 0
    assert {row["data_source"] for row in read(tmp_path)} == {"school math"} and not (
        tmp_path / "test.parquet"
    ).exists()


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.jsonl", *sums(6))
    words = ["--input", path, *MATH, "split=2", "--out", tmp_path / "out"]
    before = combine_datasets.make_plan
    for rows, message in ((sums(6, 1), "a.jsonl:1 changed while it was read"), (sums(4), "a.jsonl:5 is gone")):
        write(path, *sums(6))

        def plan_and_change(*arguments, rows=rows):
            write(path, *rows)
            return before(*arguments)

        monkeypatch.setattr(combine_datasets, "make_plan", plan_and_change)
        code, _, error = run(capsys, *words)
        assert code == 1 and message in error and not list((tmp_path / "out").iterdir())


def test_other_types_become_text_as_the_trainer_makes_them(tmp_path, capsys):
    rows = [
        chat(f"{i}?", people=i % 2, reward_model={"style": "x", "ground_truth": {"b": [i], "a": "k"}}) for i in range(4)
    ]
    path = write(tmp_path / "x.parquet", *rows)
    words = ["--input", path, "source_column=people", "split=1", "--out", tmp_path]
    assert run(capsys, *words)[0] == 0
    before = PromptDataset(str(path), "people", encode=lambda m: [1])
    after = PromptDataset([str(tmp_path / f"{s}.parquet") for s in ("train", "test")], encode=lambda m: [1])
    assert {(before[i].source, before[i].ground_truth, before[i].text) for i in range(4)} == {
        (after[i].source, after[i].ground_truth, after[i].text) for i in range(4)
    }
    assert {row["reward_model"]["style"] for row in read(tmp_path)} == {"x"}


def test_system_messages_and_abilities(tmp_path, capsys):
    system = {"role": "system", "content": "Old."}
    path = write(
        tmp_path / "x.parquet",
        *(chat(f"{i}?", prompt=[system, {"role": "user", "content": f"{i}?"}], ability="x") for i in range(2)),
    )
    for options, expected, ability in (
        ([], ["Old.", "0?"], "x"),
        (["system=New.", "ability=y"], ["New.", "0?"], "y"),
        (["system="], ["0?"], "x"),
    ):
        assert run(capsys, "--only", "train", "--input", path, *options, "--out", tmp_path)[0] == 0
        row = read(tmp_path)[0]
        assert [m["content"] for m in row["prompt"]] == expected and row["ability"] == ability


ROWS = st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from(["", "train", "test"]), st.integers(1, 9))


@settings(deadline=None)
@given(st.lists(ROWS), st.sampled_from([None, 5]), st.sampled_from([0.0, 0.3, 2.0]), st.integers(0, 4))
def test_plans_keep_their_promises(rows, longest, to_test, limit):
    """For any rows: one row a prompt, a test row if there is one; limits held, and used up."""
    kept = Rows()
    for i, (prompt, source, split, length) in enumerate(rows):
        split = split if to_test == 0 or split else ""
        if to_test == 0:
            split = split or "train"
        row = Row(f"s{source}", [{"role": "user", "content": f"P{prompt}?"}], "", "", "", split, None)
        kept.add(0, i, row, 0.0 if split else to_test, length)
    plan = make_plan(kept, Rules(7, longest, "drop", (("s*", "train", limit),)))
    taken = [i for i in range(len(rows)) if plan.fate[i] == TAKEN]
    prompts = [rows[i][0] for i in taken]
    assert len(set(prompts)) == len(prompts)
    assert all(longest is None or rows[i][3] <= longest for i in taken)
    eligible = {p for p, _, _, length in rows if longest is None or length <= longest}
    for prompt in eligible:
        mine = [i for i, r in enumerate(rows) if r[0] == prompt and (longest is None or r[3] <= longest)]
        test = [i for i in mine if rows[i][2] == "test"]
        assert plan.first[mine[0]] == plan.first[mine[-1]] == (test or mine)[0]
    for source in {r[1] for r in rows}:
        trained = [i for i in taken if rows[i][1] == source and plan.split[i] == 0]
        cut = [i for i in range(len(rows)) if rows[i][1] == source and plan.fate[i] == 3]
        assert len(trained) <= limit and (not cut or len(trained) == limit)
    assert all(rows[i][2] in ("", ("train", "test")[plan.split[i]]) for i in range(len(rows)))


def test_prompts_are_compared_without_case_space_and_compatibility_forms():
    def form(text):
        return normalised([{"role": "system", "content": "S"}, {"role": "user", "content": text}])

    assert form("What is\n½ + ２?") == form("  what IS 1⁄2 + 2?") != form("What is 12 + 2?")
    assert len({form("".join(pair)) for pair in itertools.product("ab", repeat=2)}) == 4
