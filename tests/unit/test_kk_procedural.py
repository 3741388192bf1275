"""Tasks of the reasoning-gym library as data: no question twice, none in both splits, and each judged as it was."""

import dataclasses
import importlib.metadata
import itertools
import json
import random
import sys
import types

import pyarrow.parquet as pq
import pytest
import reasoning_gym

from kk import procedural
from kk.procedural import SEEDS, SPLITS, first_seed, split_of
from megatron_dump.data import PromptDataset


@dataclasses.dataclass
class Sums:
    """A data set with the library's ways: item i of a seed is a function of seed + i, and questions repeat."""

    seed: int
    size: int
    largest: int = 60
    answers: str = "text"
    category = "arithmetic"

    def __getitem__(self, i):
        if not 0 <= i < self.size:
            raise IndexError(i)
        rng = random.Random(self.seed + i)
        a, b = rng.randint(0, self.largest), rng.randint(0, self.largest)
        answer = {"text": str(a + b), "tuple": str(a + b), "none": None}[self.answers]
        metadata = {"difficulty": (0, self.largest), **({"parts": (a, b)} if self.answers == "tuple" else {})}
        return {"question": f"{a} + {b} = ?", "answer": answer, "metadata": metadata}

    def score_answer(self, answer, entry):
        if self.answers == "tuple" and not isinstance(entry["metadata"]["parts"], tuple):
            return 0.0
        return float(answer == entry["answer"])


@pytest.fixture
def library(monkeypatch):
    """A module in the library's place, whose questions repeat often; the last test takes the library itself."""
    module, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"sums": Sums, "chain_sum": Sums}
    module.create_dataset = lambda name, **config: Sums(**config)
    module.factory = factory
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")


def run(capsys, *arguments):
    code = procedural.main([str(word) for word in arguments])
    return code, capsys.readouterr().err


def questions(path):
    return [row["prompt"][-1]["content"] for row in pq.read_table(path).to_pylist()]


def test_item_seeds_of_splits_and_seeds_never_meet():
    firsts = sorted(first_seed(seed, split) for seed in range(procedural.MAX_SEED + 1) for split in SPLITS)
    assert all(b - a == SEEDS for a, b in itertools.pairwise(firsts)) and firsts[-1] + SEEDS == 1 << 32


def test_no_question_is_twice_or_in_both_splits_of_any_seeds(library, tmp_path, capsys):
    found = {"train": set(), "test": set()}
    for seed in (0, 1, 2):  # neighbours: in the library they share all items but one
        out = tmp_path / str(seed)
        assert run(capsys, "--task", "sums", "--seed", seed, "--train", 400, "--test", 100, "--out", out)[0] == 0
        for split in SPLITS:
            asked = questions(out / f"{split}.parquet")
            assert len(set(asked)) == len(asked) == {"train": 400, "test": 100}[split]
            found[split] |= set(asked)
    assert not found["train"] & found["test"]
    assert split_of("1 + 2\n= ?") == split_of("1 + 2 = ?")


def test_same_seed_same_file(library, tmp_path, capsys):
    marks = []
    for seed in (3, 3, 4):
        run(capsys, "--task", "sums", "--seed", seed, "--train", 50, "--test", 10, "--out", tmp_path)
        marks.append(pq.read_schema(tmp_path / "train.parquet").metadata)
    assert marks[0] == marks[1] != marks[2] and marks[0][b"generator"] == b"reasoning-gym 0.0"


def test_rows_can_be_judged_from_the_ground_truth(library, tmp_path, capsys):
    words = ["--task", "sums", "chain_sum", "--config", '{"largest": 99}', "--instruction", "Think.", "--system", "Hi."]
    assert run(capsys, *words, "--train", 30, "--test", 5, "--out", tmp_path)[0] == 0
    data = PromptDataset(str(tmp_path / "train.parquet"), encode=lambda messages: [len(messages)])
    assert data.sources == ["rg_chain_sum", "rg_sums"] and len(data) == 60
    for row in pq.read_table(tmp_path / "train.parquet").to_pylist():
        truth = json.loads(row["reward_model"]["ground_truth"])
        judge = Sums(0, 1, **truth["config"])
        assert judge.score_answer(row["extra_info"]["answer"], truth["entry"]) == 1.0
        assert row["prompt"] == [
            {"role": "system", "content": "Hi."},
            {"role": "user", "content": truth["entry"]["question"] + " Think."},
        ]
        seed = row["extra_info"]["seed"]
        assert Sums(seed, 1, largest=99)[0]["question"] == truth["entry"]["question"]
        assert (row["ability"], row["data_source"]) == ("arithmetic", f"rg_{truth['task']}")


def test_an_entry_that_json_changes_is_refused(library, tmp_path, capsys):
    words = ["--task", "sums", "--train", 5, "--test", 1, "--out", tmp_path, "--config"]
    assert run(capsys, *words, '{"answers": "none"}')[0] == 0  # judged by what JSON keeps
    (tmp_path / "train.parquet").unlink()
    code, error = run(capsys, *words, '{"answers": "tuple"}')
    assert code == 1 and "not judged alike once it was JSON" in error and not (tmp_path / "train.parquet").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "sum"], "--task sum: not among the library's 2 tasks; sums"),
        (["--task", "sums", "--config", '{"big": 1}'], "it does not take --config"),
        (["--task", "sums", "--seed", "512"], "--seed 512: must be from 0 to 511"),
        (["--task", "sums", "--config", '{"largest": 2}'], "distinct train questions found; lower --train"),
    ],
)
def test_errors_are_one_line(library, words, message, tmp_path, capsys):
    code, error = run(capsys, *words, "--out", tmp_path)
    assert code == 1 and message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_without_the_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    code, error = run(capsys, "--task", "sums", "--out", tmp_path)
    assert code == 1 and "pip install reasoning-gym" in error


def test_options_are_a_json_object(capsys):
    for text in ("[1]", "{", '{"seed": 1}'):
        with pytest.raises(SystemExit):
            procedural.main(["--task", "sums", "--config", text, "--out", "x"])
    assert "seed and size are set" in capsys.readouterr().err


def test_the_library_itself(tmp_path, capsys):
    words = ["--task", "chain_sum", "spell_backward", "--seed", 9, "--train", 40, "--test", 10]
    assert run(capsys, *words, "--out", tmp_path)[0] == 0
    for split in SPLITS:
        rows = pq.read_table(tmp_path / f"{split}.parquet").to_pylist()
        assert len({row["prompt"][0]["content"] for row in rows}) == len(rows) == (80 if split == "train" else 20)
        for row in rows:
            truth = json.loads(row["reward_model"]["ground_truth"])
            judge = reasoning_gym.create_dataset(truth["task"], **truth["config"])
            assert judge.score_answer(row["extra_info"]["answer"], truth["entry"]) == 1.0
            assert judge.score_answer("no", truth["entry"]) < 0.5


def test_a_task_whose_scorer_takes_anything_is_refused(tmp_path, capsys):
    words = ["--task", "game_of_life_halting", "--train", 40, "--test", 10, "--out", tmp_path]
    code, error = run(capsys, *words)
    assert code == 1 and "its scorer takes '?' for right" in error and not list(tmp_path.iterdir())
