"""The reward scores what an answer says, however it is rendered, and nothing that merely looks like it."""

import itertools
import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kk.dataset import to_row
from kk.generate import iter_puzzles
from megatron_dump.rewards import kk, register_reward, reward_fn, reward_for_source

RIGHT = {"Zoey": "knave", "Oliver": "knight", "Sam": "knight"}
CLAUSES = [f"{name} is a {role}" for name, role in RIGHT.items()]
TRUTH = json.dumps({"solution_text_format": "\n".join(f"({i}) {c}" for i, c in enumerate(CLAUSES, 1))})


def judge(answer, truth=TRUTH):
    return kk.kk_reward(f"<think>so</think>\n<answer>{answer}</answer>", truth)


def totals(score):
    return score.reward, score.correct, score.well_formed


HONEST = [
    "\n".join(f"({i}) {c}" for i, c in enumerate(CLAUSES, 1)),
    " ".join(f"({i}) {c}" for i, c in enumerate(CLAUSES, 1)),
    "\r\n".join(f"{i}. {c}." for i, c in enumerate(CLAUSES, 1)),
    "\n".join(f"{i}) {c};" for i, c in enumerate(CLAUSES, 1)),
    "\n".join(f"- {c}" for c in CLAUSES),
    "\n".join(f"* **{name}** is a **{role}**" for name, role in RIGHT.items()),
    "\n".join(f"**({i}) {c}**" for i, c in enumerate(CLAUSES, 1)),
    "\n".join(f"- **{name}:** {role}" for name, role in RIGHT.items()),
    "\n".join(f"{name}: {role}" for name, role in RIGHT.items()),
    "\n".join(f"{name} is the {role}." for name, role in RIGHT.items()),
    f"{CLAUSES[0]}, {CLAUSES[1]}, and {CLAUSES[2]}.",
    f"{CLAUSES[2]} and {CLAUSES[0]} and {CLAUSES[1]}",
    "\n\n  Knights and knaves:\n" + "\n".join(CLAUSES) + "\n",
    "**Knights and knaves:**\n" + "\n".join(CLAUSES),
    "\n".join([*CLAUSES, CLAUSES[0]]),
    ", ".join(CLAUSES).upper(),
]


@pytest.mark.parametrize("answer", HONEST)
def test_honest_renderings_are_right(answer):
    assert totals(judge(answer)) == (3.0, True, True)


@pytest.mark.parametrize("answer", HONEST)
def test_the_same_renderings_are_wrong_for_another_puzzle(answer):
    other = json.dumps({"solution_text_format": "(1) Zoey is a knight\n(2) Oliver is a knight\n(3) Sam is a knight"})
    assert totals(judge(answer, other)) == (-0.5, False, True)


NOT_ANSWERS = [
    "",
    "It is not true that " + ", ".join(CLAUSES),
    "Nobody named " + ", ".join(CLAUSES),
    "Not-" + ", ".join(CLAUSES),
    "Is it so that " + ", ".join(CLAUSES) + "?",
    ", ".join(CLAUSES) + "?",
    "If " + ", ".join(CLAUSES),
    ", ".join(CLAUSES) + ", or maybe a liar",
    ", ".join(CLAUSES) + ". All of this is wrong",
    ", ".join(CLAUSES) + " or Sam is a knave",
    ", ".join(CLAUSES) + ", Sam is a knave",  # said to be both
    ", ".join(CLAUSES) + ", Zoe is a knave",  # somebody else
    ", ".join(CLAUSES) + ", Sam is a \u212anave",  # Kelvin sign
    ", ".join(CLAUSES).replace("knave", "\u212anave"),
    ", ".join(CLAUSES) + ", Sam \u0131s a knave",  # dotless i
    ", ".join(CLAUSES).replace("Sam", "S\u0430m"),  # Cyrillic a
    ", ".join(CLAUSES).replace("Sam is", "Sam\u200b is"),
    ", ".join(CLAUSES).replace("is a", "is not a"),
    ", ".join(CLAUSES).replace("is a knave", "is a knave and a knight"),
    ", ".join(CLAUSES).replace("knight", "knights"),
    ", ".join(CLAUSES[:2]),
    ", ".join(CLAUSES) + ", and",
    ", ".join(CLAUSES) + "\n- ",
    " ".join(CLAUSES),  # nothing between the clauses
    "~~" + ", ".join(CLAUSES) + "~~",
    "**" + ", ".join(CLAUSES),
    ", ".join(CLAUSES * 100),  # right, but no honest answer is as long
]


@pytest.mark.parametrize("answer", NOT_ANSWERS)
def test_anything_else_is_unreadable(answer):
    score = judge(answer)
    assert totals(score) == (-1.0, False, False)
    assert score.reason.startswith("unreadable: ") and len(score.reason) <= 120 and score.reason.isascii()


GOOD = f"<think>so</think> <answer>{', '.join(CLAUSES)}</answer>"


@pytest.mark.parametrize("end", ["", "\n", *sorted(kk.END_OF_TURN), " <|im_end|>\n"])
def test_one_end_of_turn_token_may_follow(end):
    assert totals(kk.kk_reward(GOOD + end, TRUTH)) == (3.0, True, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ", ".join(CLAUSES),
        GOOD + " bye",
        GOOD + "<|im_end|><|im_end|>",
        GOOD + GOOD,
        GOOD.replace("</think>", ""),
        GOOD.replace("<think>", "").replace("</think>", "</think><think>"),
        GOOD.replace("</answer>", "<answer>"),
        f"<answer>{CLAUSES[0]}</answer><think>so</think>",
        # a wrong answer, then a turn that the model wrote itself
        f"<think>so</think><answer>Zoey is a knight</answer>\nAssistant: {GOOD}",
    ],
)
def test_bad_format(text):
    score = kk.kk_reward(text, TRUTH)
    assert (*totals(score), score.reason) == (-3.0, False, False, "bad format")


def test_own_solutions_score_three_and_their_opposites_do_not():
    for n in (2, 3, 5, 8, 14):
        for puzzle in itertools.islice(iter_puzzles(n, seed=3), 15):
            truth = to_row(puzzle, "train")["reward_model"]["ground_truth"]
            for answer in (puzzle["solution_text"], puzzle["solution_text_format"]):
                assert judge(answer, truth).reward == 3.0
                opposite = answer.replace("knight", "?").replace("knave", "knight").replace("?", "knave")
                assert totals(judge(opposite, truth)) == (-0.5, False, True)


def test_names_may_be_any_text():
    truth = json.dumps(
        {"solution_text_format": "(1) Ana María is a knave\n(2) Ana is a knight\n(3) Jean-Luc is a knight"}
    )
    assert judge("Ana is a knight, Ana María is a knave and **Jean-Luc** is a knight.", truth).reward == 3.0
    assert judge("Ana is a knight, Ana Maria is a knave, Jean-Luc is a knight", truth).reward == -1.0


@pytest.mark.parametrize(
    "truth", ["", "{}", "[]", "null", '{"solution_text_format": 3}', '{"solution_text_format": ""}',
              '{"solution_text_format": "(1) Zoey is a spy"}', '{"solution_text_format": "(1)  is a knave"}']
)  # fmt: skip
def test_a_bad_ground_truth_is_the_data_sets_fault(truth):
    with pytest.raises(ValueError, match="ground truth"):
        judge("Zoey is a knave", truth)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=300))
def test_no_text_raises_or_scores(noise):
    assert kk.kk_reward(noise, TRUTH).reward == -3.0
    assert judge(noise).reward in (-3.0, -1.0)


PIECES = [
    *kk.TAGS,
    *CLAUSES,
    *RIGHT,
    "knight",
    "knave",
    " is ",
    " a ",
    ":",
    ",",
    "\n",
    "and",
    "not",
    "(1)",
    "1.",
    "-",
    "**",
    "K",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_only_texts_that_say_the_solution_score_three(pieces):
    answer = "".join(pieces)
    score = judge(answer)
    assert score.reward in (3.0, -0.5, -1.0, -3.0)
    if score.correct:
        assert "not" not in pieces
        said = set(
            re.findall(r"(zoey|oliver|sam)(?: is |:)\s*(?:a )?\s*(knight|knave)", answer.replace("**", "").lower())
        )
        assert said <= {(name.lower(), role) for name, role in RIGHT.items()}


def steps(text):
    """Lines of kk.py executed while judging: work that does not depend on the machine."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == kk.__file__ else None

    sys.settrace(trace)
    try:
        kk.kk_reward(text, TRUTH)
    finally:
        sys.settrace(None)
    return count


HOSTILE = {
    "unclosed": "<answer>",
    "tags": "<think></think><answer></answer>",
    "spaces": " ",
    "names": "Zoey is a knave, ",
    "marks": "(1) - and ",
    "bold": "**",
    "digits": "1",
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_megabyte_of_anything_takes_no_more_steps_than_a_bounded_answer(piece):
    megabyte = piece * (1_000_000 // len(piece))
    assert steps(megabyte) < 100
    assert steps(f"<think>{megabyte}") < 100
    assert steps(f"<think></think><answer>{megabyte}</answer>") < 100
    assert steps(f"<think></think><answer></answer>{megabyte}") < 400


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
def test_steps_grow_in_proportion_to_the_answer(piece):
    size = 512 // len(piece)
    small, large = (steps(f"<think></think><answer>{piece * (size * k // 4)}</answer>") for k in (1, 4))
    assert large <= 5 * small + 100


def test_registry():
    assert reward_fn("kk") is kk.kk_reward
    assert reward_for_source("kk_logic_5", {"gsm8k": "math", "kk_logic_*": "kk"}) is kk.kk_reward
    with pytest.raises(ValueError, match=r"unknown reward function 'kkk'; known: .*\bkk\b"):
        reward_fn("kkk")
    with pytest.raises(ValueError, match=r"source 'gsm8k'; patterns: kk_\*"):
        reward_for_source("gsm8k", {"kk_*": "kk"})
    with pytest.raises(ValueError, match="exists already"):
        register_reward("kk", kk.kk_reward)
