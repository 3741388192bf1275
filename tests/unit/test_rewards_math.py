"""The mathematical reward: equal in any notation, strict about everything around the one expression."""

import fractions
import math
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.rewards import GroundTruthError, reward_fn
from megatron_dump.rewards.math import MathReward

REWARD = MathReward()


def judge(answer, truth, reward=REWARD):
    return reward(f"<think>so</think>\n<answer>{answer}</answer>", truth)


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("18", "18"),
        ("18", "18."),
        ("18", "$18$"),
        ("18", "\\$18"),
        ("\\$18", "18"),
        ("18", "\\boxed{18}"),
        ("\\boxed{18}", "$18$"),
        ("18", "**18**"),
        ("18", "x = 18"),
        ("18", "6 \\times 3 = 18"),
        ("18", "18 dollars"),
        ("18", "18 \\text{ cm}"),
        ("1000", "1,000"),
        ("1000", "1\\,000"),
        ("1000", "10^3"),
        ("200000", "2 \\times 10^5"),
        ("-3", "−3"),
        ("90", "90°"),
        ("50\\%", "50%"),
        ("1/2", "0.5"),
        ("\\frac{1}{2}", "\\frac12"),
        ("3/2", "1 1/2"),
        ("1/3", "0.333333"),
        ("\\sqrt{2}", "\\sqrt 2"),
        ("2\\pi", "\\pi \\cdot 2"),
        ("x^2+2x+1", "(x+1)^2"),
        ("x^2", "x**2"),
        ("x>3", "3<x"),
        ("y=x+1", "y-x=1"),
        ("\\{1,2\\}", "2, 1"),
        ("1, 2", "1 \\text{ or } 2"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&\\frac{8}{2}\\end{pmatrix}"),
        ("\\text{east}", "East"),
        ("\\text{no solution}", "no solution"),
        ("B", "(B)"),
        ("Evelyn", "\\text{Evelyn}"),
    ],
)
def test_equal_in_any_notation(truth, answer):
    score = judge(answer, truth)
    assert (score.reward, score.correct, score.well_formed) == (3.0, True, True), score.reason


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("18", "81"),
        ("18", "-18"),
        ("18", "18, 19"),
        ("18", "\\{18, 19\\}"),
        ("18", "18 or 19"),
        ("18", "x > 17"),
        ("1/3", "0.33"),
        ("x+1", "y+1"),
        ("x=4", "y=4"),
        ("(1,2)", "(2,1)"),
        ("[1,2)", "(1,2]"),
        ("B", "C"),
        ("Evelyn", "Nyleve"),  # as products of letters they are equal
        ("\\text{east}", "seat"),
        ("3", "three"),
    ],
)
def test_wrong(truth, answer):
    score = judge(answer, truth)
    assert (score.reward, score.correct, score.well_formed) == (-0.5, False, True), score.reason


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("4", ""),
        ("4", "not 4"),
        ("4", "\\text{not }4"),
        ("4", "4 \\text{ is wrong}"),
        ("4", "4, maybe 5"),
        ("4", "4?"),
        ("4", "\\boxed{3} \\boxed{4}"),
        ("4", "$3$ or $4$"),
        ("4", "2+2"),
        ("4", "2*2"),
        ("24", "4!"),
        ("5050", "\\sum_{i=1}^{100} i"),
        ("4", "\\int_{0}^{4} 1 \\, dx"),
        ("1/2", "1/4+1/4"),
        ("3", "1 2"),  # the library adds them up
        ("4", "4}"),
        ("4", "{" * 20 + "4" + "}" * 20),
        ("4", "4" * 1000),
        ("4", "\\frac{4}"),
    ],
)
def test_unreadable(truth, answer):
    score = judge(answer, truth)
    assert (score.reward, score.correct, score.well_formed) == (-1.0, False, False), score.reason
    assert score.reason.startswith("unreadable: ")


def test_the_format_counts():
    assert REWARD("18", "18").reward == -3.0
    assert REWARD("<think>18</think><answer>18</answer> 18", "18").reason.startswith("bad format")
    assert reward_fn("math", {"mode": "binary"})("<think></think><answer>18</answer>", "18").reward == 1.0
    assert reward_fn("math", {"mode": "binary"})("18", "18").reward == 0.0


def test_boxed_answers_need_no_tags():
    boxed = MathReward(answer_in="boxed")
    assert boxed("First \\boxed{3}, then it is $\\boxed{\\frac{1}{2}}$.", "0.5").correct
    assert not boxed("It is \\boxed{0.5}, or rather \\boxed{3}.", "0.5").correct
    assert boxed("It is 0.5", "0.5").reason.startswith("bad format")
    assert boxed("\\boxed{0.5", "0.5").reason.startswith("bad format")


@pytest.mark.parametrize("truth", ["", "  ", "$$", "\\boxed{}"])
def test_a_missing_ground_truth_is_the_data_sets_fault(truth):
    with pytest.raises(GroundTruthError, match="ground truth"):
        judge("4", truth)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mode", "dumb", "mode: 'dumb' is unknown; known: dump"),
        ("answer_in", "text", "answer_in: 'text'"),
        ("timeout_s", 0.5, "timeout_s: 0.5"),
        ("end_tokens", "<bye>", "end_tokens: '<bye>'"),
        ("think_in_prompt", 1, "think_in_prompt: 1"),
        ("colour", "red", "colour: no such option"),
    ],
)
def test_bad_options_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        reward_fn("math", {option: value})


NUMBERS = st.fractions(min_value=-1000, max_value=1000, max_denominator=64)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS, st.integers(2, 9))
def test_fractions_compare_as_fractions(said, truth, k):
    """Against Python's own fractions."""
    p, q = said.numerator, said.denominator
    written = [f"{p}/{q}", f"\\frac{{{p}}}{{{q}}}", f"$\\dfrac{{{p * k}}}{{{q * k}}}$", f"x = {p * k}/{q * k}"]
    written += [str(p)] if q == 1 else []
    for answer in written:
        assert judge(answer, f"{truth.numerator}/{truth.denominator}").correct == (said == truth), answer
        assert judge(answer, f"\\frac{{{p}}}{{{q}}}").correct, answer
    assert not judge(written[0], str(said + fractions.Fraction(1, 7))).correct


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(), max_size=60), st.sampled_from(["4", "x+1", "\\text{east}"]))
def test_no_text_raises(noise, truth):
    for text in (noise, f"<think></think><answer>{noise}</answer>"):
        try:
            score = REWARD(text, truth)
        except TimeoutError:
            continue
        assert math.isfinite(score.reward)


HOSTILE = ["9^{9^{9^{9}}}", "99999999!^{2}", "\\binom{10^9}{10^8}+x", "(" * 15 + "1" + ")" * 15 + "!" * 9]


@pytest.mark.parametrize("answer", HOSTILE)
def test_what_cannot_be_computed_in_time_says_so(answer):
    start = time.monotonic()
    try:
        score = judge(answer, "x+4", MathReward(timeout_s=1))
        assert not score.correct
    except TimeoutError as error:
        assert "took over 1 s" in str(error)
    assert time.monotonic() - start < 20


def test_a_tower_of_powers_is_a_time_out():
    with pytest.raises(TimeoutError, match="took over 1 s"):
        judge("9^{9^{9^{9}}}", "4", MathReward(timeout_s=1))


def test_other_threads_have_no_signal_and_need_none():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(judge("2^5", "32")))
    thread.start()
    thread.join()
    assert scores[0].correct


@pytest.mark.parametrize("piece", ["\\boxed{", "$", "x+", "{", "\\frac{1}", "<answer>", "1 "])
@pytest.mark.parametrize("reward", [REWARD, MathReward(answer_in="boxed")], ids=["tags", "boxed"])
def test_a_long_text_costs_no_more_than_its_length(reward, piece):
    """The expression that the library sees is short whatever the text: a megabyte of anything is refused at once."""
    for text in (piece * 100_000, f"<think></think><answer>{piece * 100_000}</answer>"):
        start = time.process_time()
        assert not reward(text, "4").well_formed
        assert time.process_time() - start < 0.5
