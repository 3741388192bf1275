"""The tag format on its own, and the registry: from the configuration's names and blocks to reward functions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dump.rewards import kk, register_reward, registry, reward_fn, reward_for_source, reward_functions
from megatron_dump.rewards.format import TAGS, BadFormat, FormatReward, TagFormat
from tests.unit import faulty_rewards

PATH = "tests.unit.faulty_rewards"


def test_format_is_all_that_counts():
    score = FormatReward()("<think>hm</think> well, <answer>anything at all</answer><|im_end|>", "not read")
    assert (score.reward, score.correct, score.well_formed, score.components) == (1.0, True, True, {"format": 1.0})
    score = FormatReward()("anything at all", "not read")
    assert (score.reward, score.correct, score.well_formed, score.components) == (-1.0, False, False, {"format": -1.0})
    assert score.reason == "bad format: <think> 0 times"


# what may stand inside and around the tags without being a tag, a special token or a speaker's name
PROSE = st.text(st.characters(exclude_characters="<>[]:#|｜", exclude_categories=["Cs"]), max_size=40)


@given(PROSE, PROSE, PROSE, PROSE)
def test_the_answer_is_what_the_tags_hold(before, thought, between, answer):
    text = f"{before}<think>{thought}</think>{between}<answer>{answer}</answer>"
    assert TagFormat().answer_of(text) == answer
    assert TagFormat(think_in_prompt=True).answer_of(f"{thought}</think>{between}<answer>{answer}</answer>") == answer


@given(st.lists(st.sampled_from([*TAGS, "x", " ", "<|im_end|>"]), max_size=8))
def test_no_other_order_of_the_tags_passes(pieces):
    """Against the definition, on the pieces themselves."""
    tags = [piece for piece in pieces if piece in TAGS]
    after = [p for p in pieces[pieces.index(TAGS[3]) + 1 :] if p != " "] if TAGS[3] in pieces else []
    first = pieces[: pieces.index(TAGS[0])] if TAGS[0] in pieces else []
    middle = pieces[pieces.index(TAGS[1]) : pieces.index(TAGS[2])] if tags == [*TAGS] else []
    fine = tags == [*TAGS] and after in ([], ["<|im_end|>"]) and "<|im_end|>" not in first + middle
    try:
        TagFormat().answer_of("".join(pieces))
        passed = True
    except BadFormat:
        passed = False
    assert passed == fine


def test_names_blocks_and_patterns():
    assert reward_fn("kk") == kk.kk_reward
    assert reward_for_source("kk_logic_5", {"gsm8k": "math", "kk_logic_*": "kk"}) == kk.kk_reward
    block = {"name": "kk", "mode": "binary", "think_in_prompt": True}
    assert reward_for_source("kk_logic_5", {"kk_*": block}) == kk.KKReward(mode="binary", think_in_prompt=True)
    mapping = {"kk_[5]": "format", "kk_*": "kk", "kk_7": block}
    found = reward_functions(mapping, ["kk_[5]", "kk_5", "kk_6", "kk_7", "kk_8"])
    assert [type(f).__name__ for f in found.values()] == ["FormatReward"] * 2 + ["KKReward"] * 3
    assert found["kk_6"] is found["kk_8"] and found["kk_7"] == kk.KKReward(mode="binary", think_in_prompt=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("kkk", r"model\.data\.rewards\.s\.name: unknown reward function 'kkk'; known: .*\bkk\b.*package\.module:func"),
        (3, r"model\.data\.rewards\.s: 3 must be a name, or a block"),
        ({"mode": "dump"}, r"model\.data\.rewards\.s: .* must be a name, or a block"),
        ({"name": "kk", "mood": 1}, r"s\.mood: no such option \(value 1\); options of kk: end_tokens, mode, think_in_"),
        ({"name": "kk", "mode": "dumb"}, r"s\.mode: 'dumb' is unknown; known: dump, answer, binary"),
        ({"name": f"{PATH}:Stateful", "start": -1}, r"s\.start: -1 must not be negative"),
        ({"name": f"{PATH}:obey", "x": 1}, rf"s\.x: no such option \(value 1\); options of {PATH}:obey: none"),
        ("nowhere.at.all:f", r"s\.name: cannot import reward function 'nowhere\.at\.all:f': No module named 'nowhere'"),
        (f"{PATH}:nothing", r"s\.name: cannot import .*nothing"),
        (f"{PATH}:", r"s\.name: cannot import"),
        (":f", r"s\.name: cannot import"),
        (f"{PATH}:ORDERS", r"s\.name: .*ORDERS' is .*, not a function"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        reward_for_source("s", {"s": value})


def test_a_source_without_a_pattern_is_refused():
    with pytest.raises(ValueError, match=r"source 'gsm8k'; patterns: kk_\*"):
        reward_for_source("gsm8k", {"kk_*": "kk"})


def test_functions_and_factories_by_path():
    assert reward_fn(f"{PATH}:obey") is faulty_rewards.obey
    assert reward_fn(f"{PATH}:make_constant", {"value": 4.0})("", "").reward == 4.0
    assert reward_fn(f"{PATH}:with_option")("", "").reward == 1.0
    assert reward_fn(f"{PATH}:with_option", {"bonus": 2})("", "").reward == 3.0
    counter = reward_fn(f"{PATH}:Stateful", {"start": 7})
    assert [counter("", "").reward for _ in range(2)] == [8.0, 9.0]


def test_registering(monkeypatch):
    monkeypatch.setattr(registry, "_TARGETS", dict(registry._TARGETS))
    register_reward("mine", faulty_rewards.obey)
    assert reward_fn("mine") is faulty_rewards.obey
    with pytest.raises(ValueError, match="'kk' exists already"):
        register_reward("kk", faulty_rewards.obey)
    assert registry.importable_targets({"a": "mine", "b": {"name": "kk"}}) == {"mine": f"{PATH}:obey"}
    register_reward("bound", faulty_rewards.Stateful().__call__)
    with pytest.raises(ValueError, match="'bound' .* cannot be imported"):
        registry.importable_targets({"a": {"name": "bound"}})
    assert registry.importable_targets({"a": "mine"}) == {"mine": f"{PATH}:obey"}  # the other is not asked for
