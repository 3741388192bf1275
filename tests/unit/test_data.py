"""PromptDataset: what it reads, what identifies it, and what it refuses."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dump.data import DataError, PromptDataset

REMOVE = object()


def encode(messages):
    return [ord(c) for m in messages for c in m["content"]]


def row(question="2+2?", answer="4", source="sums", **changes):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    made = {"data_source": source, "prompt": messages, "reward_model": {"style": "rule", "ground_truth": answer}}
    return {k: v for k, v in {**made, **changes}.items() if v is not REMOVE}


def write(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def test_rows_become_prompts(tmp_path):
    paths = [write(tmp_path / "x.parquet", row(), row("3+3?", "6")), write(tmp_path / "y.parquet", row(source="logic"))]
    calls = []
    data = PromptDataset(paths, encode=lambda m: calls.append(m) or encode(m))
    assert len(data) == 3 and data.source_of_rows == ["sums", "sums", "logic"] and data.sources == ["logic", "sums"]
    assert not calls  # nothing is tokenised before it is asked for
    prompt = data[1]
    assert data[1] is prompt and len(calls) == 1
    assert (prompt.index, prompt.source, prompt.ground_truth, prompt.text) == (1, "sums", "6", "3+3?")
    assert prompt.token_ids.tolist() == encode(calls[0]) and prompt.token_ids.dtype == "int64"
    with pytest.raises(IndexError):
        data[3]


def test_other_types_become_text(tmp_path):
    structured = {"style": "rule", "ground_truth": {"b": [1], "a": "knave"}}
    data = PromptDataset(
        write(tmp_path / "x.parquet", row(reward_model=structured, people=3)), source_key="people", encode=encode
    )
    assert data.sources == ["3"] and data[0].ground_truth == '{"a": "knave", "b": [1]}'


def test_the_fingerprint_is_of_the_contents(tmp_path):
    rows = [row(), row("3+3?", "6")]
    one = PromptDataset(write(tmp_path / "x.parquet", *rows), encode=encode).fingerprint
    (tmp_path / "elsewhere").mkdir()
    split = [write(tmp_path / "elsewhere" / f"{i}.parquet", {**r, "extra": i}) for i, r in enumerate(rows)]
    assert PromptDataset(split, encode=encode).fingerprint == one
    assert PromptDataset(split[::-1], encode=encode).fingerprint != one
    for changed in (row("3+4?", "6"), row("3+3?", "7"), row("3+3?", "6", "other")):
        assert PromptDataset(write(tmp_path / "z.parquet", rows[0], changed), encode=encode).fingerprint != one


def test_a_long_prompt_is_refused_by_row(tmp_path):
    data = PromptDataset(write(tmp_path / "x.parquet", row(), row("9" * 50)), encode=encode, max_prompt_length=20)
    assert len(data[0].token_ids) == 13
    message = r"model.data.max_prompt_length=20: the prompt of row 1 \(sums\) has 59 tokens"
    for look in (lambda: data[1], data.check_lengths):
        with pytest.raises(DataError, match=message):
            look()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            row(data_source=REMOVE, topic="x"),
            r"no column 'data_source' \(trainer.*source_key\); set it to one of: prompt",
        ),
        (row(prompt=REMOVE), "has no column 'prompt'; its columns: data_source, reward_model"),
        (row(reward_model="4"), "column 'reward_model' must be a struct with a field 'ground_truth', not string"),
        (row(source=None), "row 0: column 'data_source' is null"),
        (row(answer=None), "row 0: column 'reward_model.ground_truth' is null"),
        (row(prompt=None), "row 0: column 'prompt' is null or empty"),
        (row(prompt="2+2?"), "row 0: column 'prompt' must be a list of messages"),
        (row(question=None), "row 0: a message's 'content' is None, not a string"),
    ],
)
def test_broken_rows_are_refused_in_one_line(tmp_path, broken, message):
    with pytest.raises(DataError, match=message) as error:
        PromptDataset(write(tmp_path / "x.parquet", broken), encode=encode)
    assert "\n" not in str(error.value)


def test_missing_unreadable_and_empty_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.data.validation_files: no such file: nowhere.parquet"):
        PromptDataset("nowhere.parquet", encode=encode, key="model.data.validation_files")
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(DataError, match="model.data.train_files: .* cannot be read as parquet"):
        PromptDataset(str(tmp_path / "text.parquet"), encode=encode)
    empty = str(tmp_path / "empty.parquet")
    pq.write_table(pa.Table.from_pylist([row()]).slice(0, 0), empty)
    with pytest.raises(DataError, match="model.data.train_files: no rows in"):
        PromptDataset([empty], encode=encode)
    with pytest.raises(DataError, match="no rows in an empty list of files"):
        PromptDataset([], encode=encode)


def test_rows_are_kept_from_all_sources_in_turn(tmp_path):
    sources = [*"aaaaabbc"]
    path = write(tmp_path / "x.parquet", *(row(f"{i}?", source=source) for i, source in enumerate(sources)))
    kept = {}
    for n in (3, 5, 7, 99):
        data = PromptDataset(path, encode=encode)
        data.keep(n)
        kept[n] = [data[i].text.rstrip("?") for i in range(len(data))]
        assert "".join(data.source_of_rows) == "".join(sources[int(i)] for i in kept[n])
    assert kept == {3: [*"057"], 5: [*"01567"], 7: [*"0123567"], 99: [*"01234567"]}
    with pytest.raises(DataError, match="2 rows are too few for 3 sources"):
        PromptDataset(path, encode=encode).keep(2)
