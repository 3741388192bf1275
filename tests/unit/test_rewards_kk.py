"""The reward scores what an answer says, however it is rendered, and nothing that merely looks like it."""

import itertools
import json
import math
import re
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kk.dataset import to_row
from kk.generate import iter_puzzles
from megatron_dump.rewards import GroundTruthError, kk, kk_answer, kk_words, scale
from megatron_dump.rewards import format as tag_format
from tests.unit.kk_styles import STYLES, article, clauses, ground_truth

PEOPLE = [("Zoey", "knave"), ("Oliver", "knight"), ("Sam", "knight")]
RIGHT = dict(PEOPLE)
CLAUSES = clauses(PEOPLE)
TRUTH = ground_truth(PEOPLE)


def judge(answer, truth=TRUTH):
    return kk.kk_reward(f"<think>so</think>\n<answer>{answer}</answer>", truth)


def totals(score):
    return score.reward, score.correct, score.well_formed


@pytest.mark.parametrize("style", STYLES)
def test_honest_renderings_are_right(style):
    assert totals(judge(STYLES[style](PEOPLE))) == (3.0, True, True)


@pytest.mark.parametrize("style", STYLES)
def test_the_same_renderings_are_wrong_for_another_puzzle(style):
    other = ground_truth([("Zoey", "knight"), ("Oliver", "knight"), ("Sam", "knight")])
    assert totals(judge(STYLES[style](PEOPLE), other)) == (-0.5, False, True)


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
    ", ".join(CLAUSES) + "!?",
    "I guess " + ", ".join(CLAUSES),
    "It is wrong that " + ", ".join(CLAUSES),
    "The wrong answer is: " + ", ".join(CLAUSES),
    "The answer is not: " + ", ".join(CLAUSES),
    "~~Sam is a knight~~ " + ", ".join(CLAUSES),
    ", ".join(CLAUSES).replace("Sam is", "Sam may be"),
    ", ".join(CLAUSES).replace("Sam is a", "Sam isn't a"),
    ", ".join(CLAUSES).replace("Sam is a knight", "Sam is a non-knight"),
    ", ".join(CLAUSES).replace("Sam is a knight", "Sam is a knight-knave"),
    ", ".join(CLAUSES).replace("Sam is a knight", "Sam: knight | knave"),
    ", ".join(CLAUSES).replace("Sam is a knight", "Sam (knight or knave)"),
    ", ".join(CLAUSES) + " unless Sam is a knave",
    ", ".join(CLAUSES) + "\nKnaves: Sam",
    ", ".join(CLAUSES) + "\nKnaves: none",
    "Knights: Zoey, Oliver and Sam are knaves",  # of whom?
    "Zoey is a knave; Oliver and Sam are not knights",
    "Zoey is a knave; Oliver or Sam are knights",
    "Zoey are knaves; Oliver and Sam are knights",
    "Knights: Oliver, Sam, and\nKnaves: Zoey and",
    "Knights and knaves: Zoey, Oliver, Sam",
    ", ".join(CLAUSES).replace("Sam", "Sám"),
    ", ".join(CLAUSES).replace("Sam", "Sa\u0301m"),
    ", ".join(CLAUSES).replace("Sam", "S\u0336a\u0336m\u0336"),  # struck out
    ", ".join(CLAUSES).replace("knight", "ｋnight"),
    "\u202e" + ", ".join(CLAUSES),
    ", ".join(CLAUSES).replace("is", "is\u2060"),
    "<s>" + ", ".join(CLAUSES) + "</s>",
    "Assistant: " + ", ".join(CLAUSES),
]


@pytest.mark.parametrize("answer", NOT_ANSWERS)
def test_anything_else_is_unreadable(answer):
    score = judge(answer)
    assert totals(score) == (-1.0, False, False)
    assert score.reason.startswith("unreadable: ") and len(score.reason) <= 120 and score.reason.isascii()


GOOD = f"<think>so</think> <answer>{', '.join(CLAUSES)}</answer>"


ENDS = """<|im_end|> <|endoftext|> <|eot_id|> <|end_of_text|> <|end|> <|eom_id|> <|return|> <|END_OF_TURN_TOKEN|>
<end_of_turn> <eos> </s> <｜end▁of▁sentence｜> <extra_id_1> [/INST]""".split()


@pytest.mark.parametrize("end", ["", "\n", *ENDS, " <|im_end|>\n"])
def test_one_end_of_turn_token_may_follow(end):
    assert totals(kk.kk_reward(GOOD + end, TRUTH)) == (3.0, True, True)


BAD_FORMATS = [
    "",
    ", ".join(CLAUSES),
    GOOD + " bye",
    GOOD + "<|im_end|><|im_end|>",
    GOOD + "<|im_start|>",
    GOOD + "<|begin_of_text|>",
    GOOD + "<|start_header_id|>",
    GOOD + GOOD,
    GOOD + "<answer>Zoey is a knight</answer>",
    GOOD.replace("so", "so <answer>"),  # tags inside think
    GOOD.replace("so", "<answer>Zoey is a knight</answer>"),
    GOOD.replace("</think>", ""),
    GOOD.replace("<think>", "").replace("</think>", "</think><think>"),
    GOOD.replace("</answer>", "<answer>"),
    f"<answer>{CLAUSES[0]}</answer><think>so</think>",
    # a wrong answer, then a turn that the model wrote itself
    f"<think>so</think><answer>Zoey is a knight</answer>\nAssistant: {GOOD}",
    f"Zoey is a knight.\nAssistant: {GOOD}",
    f"Zoey is a knight.\n**ASSISTANT** : {GOOD}",
    f"Zoey is a knight.<|im_end|>\n<|im_start|>assistant\n{GOOD}",
    f"Zoey is a knight.<｜Assistant｜>{GOOD}",
    GOOD.replace("</think>", "</think> Zoey is a knight. User: try again."),
    GOOD.replace("</think>", "</think>" + "Hm. " * 10_000),
]


@pytest.mark.parametrize("text", BAD_FORMATS)
def test_bad_format(text):
    score = kk.kk_reward(text, TRUTH)
    assert totals(score) == (-3.0, False, False)
    assert score.reason.startswith("bad format: ") and score.reason.isascii()


def test_words_outside_the_tags_are_nobodys_turn():
    assert kk.kk_reward(GOOD.replace("</think>", "</think>\nMy users, here is the system of it:\n"), TRUTH).correct
    assert kk.kk_reward(GOOD.replace("so", "User: hm. Assistant: <|im_end|>"), TRUTH).correct  # thoughts are free


def test_modes_and_components():
    texts = {
        "right": GOOD, "wrong": GOOD.replace("knave", "knight"), "unreadable": GOOD.replace("Sam", "Tom"),
        "bad format": "",
    }  # fmt: skip
    expected = {"dump": (3, -0.5, -1, -3), "answer": (2, -1.5, -2, -2), "binary": (1, 0, 0, 0)}
    assert expected.keys() == scale.MODES.keys()
    for mode, rewards in expected.items():
        scores = [kk.KKReward(mode=mode)(text, TRUTH) for text in texts.values()]
        assert tuple(score.reward for score in scores) == rewards
        assert [score.reason.split(":")[0] for score in scores] == [*texts]
        assert [score.components["format"] for score in scores] == [1, 1, 1, -1]
        assert [score.components["answer"] for score in scores] == [2, -1.5, -2, -2]
        assert [score.components["accuracy"] for score in scores] == [1, 0, 0, 0]
        assert [score.components["people"] for score in scores] == pytest.approx([1, 2 / 3, 0, 0])


def test_options():
    assert kk.KKReward(end_tokens=["<bye>"])(GOOD + "<bye>", TRUTH).correct
    assert not kk.kk_reward(GOOD + "<bye>", TRUTH).correct
    assert kk.KKReward(think_in_prompt=True)(GOOD.removeprefix("<think>"), TRUTH).correct
    assert not kk.KKReward(think_in_prompt=True)(GOOD, TRUTH).well_formed


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


def test_an_accent_may_be_a_sign_of_its_own():
    truth = ground_truth([("Ana Mar\u00eda", "knave"), ("\u0141uk", "knight")])
    assert judge("Ana Mari\u0301a is a knave, \u0142UK is a knight", truth).correct
    kelvin = ground_truth([("\u212aim", "knave"), ("Jo", "knight")])  # the puzzle's own unusual letter
    assert judge("\u212aim is a knave, Jo is a knight", kelvin).correct


@pytest.mark.parametrize(
    ("roles", "more"),
    [
        ([("Zoey", "saint"), ("Sam", "sinner")], {}),
        ([("Zoey", "saint"), ("Sam", "saint")], {}),  # the other word is known
        ([("Zoey", "truth-teller"), ("Sam", "liar")], {}),
        ([("Zoey", "angel"), ("Sam", "devil")], {}),
        ([("Zoey", "wizard"), ("Sam", "goblin")], {}),
        ([("Zoey", "wizard"), ("Sam", "wizard")], {"knight_knave": {"knight": "wizard", "knave": "goblin"}}),
    ],
)
def test_other_role_words(roles, more):
    truth = ground_truth(roles, **more)
    opposite = {"saint": "sinner", "truth-teller": "liar", "angel": "devil", "wizard": "goblin"}
    for style, write in STYLES.items():
        assert judge(write(roles), truth).correct, style
        wrong = [(roles[0][0], opposite[roles[0][1]]), roles[1]]
        assert totals(judge(write(wrong), truth)) == (-0.5, False, True), style
    assert totals(judge(f"Zoey is a knight, Sam is {article(roles[1][1])}", truth)) == (-1.0, False, False)


@pytest.mark.parametrize(
    "truth", ["", "{}", "[]", "null", "[" * 100_000, '{"solution_text_format": 3}', '{"solution_text_format": ""}',
              '{"solution_text_format": "(1) Zoey is happy"}', '{"solution_text_format": "(1)  is a knave"}',
              '{"solution_text_format": "(2) Zoey is a knave"}',
              '{"solution_text_format": "(1) Zoey is a knave\\n(2) zoey is a knight"}',
              '{"solution_text_format": "(1) A is a knave\\n(2) B is a knight\\n(3) C is a spy"}']
)  # fmt: skip
def test_a_bad_ground_truth_is_the_data_sets_fault(truth):
    with pytest.raises(GroundTruthError, match="ground truth"):
        judge("Zoey is a knave", truth)


def test_no_letter_passes_for_an_ascii_one():
    """All of Unicode: what the reader takes for ASCII text is ASCII, or a plain dash, arrow or quote."""
    mistaken = {
        chr(c) for c in range(0x80, sys.maxunicode + 1)
        if "".join(kk_words.tokens(chr(c))).isascii() and not chr(c).isspace() and not kk_words.impostors(chr(c))
    }  # fmt: skip
    assert mistaken == set("’–—‑−→⇒“”")


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=300))
def test_no_text_raises_or_scores(noise):
    assert kk.kk_reward(noise, TRUTH).reward == -3.0
    assert judge(noise).reward in (-3.0, -1.0)


PIECES = [
    *tag_format.TAGS,
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


CLAIMS = """Zoey is a knave;Oliver is a knight;Sam is a knight;Zoey;Sam;Knights: Oliver;Knaves: Zoey;Knaves: none;
Knights: Oliver, Sam;Knights:;Knaves:;Sam: knight;Oliver = knight;Zoey (knave);Oliver and Sam;Zoey is a knight;
Sam: knave;Oliver and Sam are knights;Zoey -> knave;knight;| Zoey | knave |""".replace("\n", "").split(";")
JOINTS = [
    ", ",
    " and ",
    "; ",
    "\n",
    ". ",
    " ",
    ": ",
    " - ",
    " | ",
    "\n2. ",
    "(",
    ")",
    " are knights",
    " are knaves",
    "",
]


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CLAIMS), st.sampled_from(JOINTS)), min_size=2, max_size=5))
def test_what_is_right_is_not_right_with_the_roles_swapped_nor_with_anything_false_in_it(parts):
    answer = "".join(itertools.chain(*parts))
    if judge(answer).correct:
        swapped = {"knight": "knave", "knave": "knight", "Knight": "Knave", "Knave": "Knight"}
        assert not judge(re.sub("[Kk]n(ight|ave)", lambda match: swapped[match[0]], answer)).correct
        assert not {"Zoey is a knight", "Sam: knave", "Knaves: none"} & {claim for claim, _ in parts}


def steps(text):
    """Lines of the reward's modules executed while judging: work that does not depend on the machine."""
    count, files = 0, {module.__file__ for module in (kk, kk_answer, kk_words, tag_format, scale)}

    def trace(frame, event, _):
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename in files else None

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
    "openings": "<|",
    "halves": "</think",
    "accents": "e\u0301\u0327",
    "wide": "\U0001d538",
    "commas": "Zoey,",
    "groups": "knights: Zoey\n",
    "table": "| name | role |\n|-|-|\n",
}


PLACES = {
    "bare": "{}",
    "thought": "<think>{}</think><answer></answer>",
    "before": "{}<think></think><answer></answer>",
    "between": "<think></think>{}<answer></answer>",
    "answer": "<think></think><answer>{}</answer>",
    "after": "<think></think><answer></answer>{}",
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_megabyte_of_anything_takes_no_more_steps_than_a_bounded_answer(piece):
    megabyte = piece * (1_000_000 // len(piece))
    for place in PLACES.values():
        assert steps(place.replace("{}", megabyte)) < 200


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
def test_steps_grow_in_proportion_to_the_answer(piece):
    size = 1024 // len(piece)
    small, large = (steps(f"<think></think><answer>{piece * (size * k // 4)}</answer>") for k in (1, 4))
    assert large <= 5 * small + 100


def slope(judge_text, piece, place, lengths=(2**16, 2**17, 2**18, 2**19, 2**20)):
    """Exponent of processor time over length, by least squares on logarithms: 1 is linear, 2 quadratic."""
    seconds = []
    for length in lengths:
        text, best = place.replace("{}", piece * (length // len(piece))), math.inf
        for _ in range(3):
            start = time.process_time()
            judge_text(text)
            best = min(best, time.process_time() - start)
        seconds.append(max(best, 1e-6))
    return np.polyfit(np.log(lengths), np.log(seconds), 1)[0]


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
def test_time_is_at_most_linear_in_the_text(piece):
    for name, place in PLACES.items():
        fits = [slope(lambda text: kk.kk_reward(text, TRUTH), piece, place) for _ in range(3)]
        assert min(fits) < 1.4, f"{name}: time grows with length to the power {min(fits):.2f}"


def test_the_slope_tells_a_quadratic_search():
    lazy = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)  # what the published reward searches with
    assert slope(lazy.findall, "<answer>", "{}", lengths=(2**11, 2**12, 2**13, 2**14)) > 1.6


# letters that capitals lead back from: the long s and its like have none of their own
LETTERS = st.characters(categories=["Ll", "Lu", "Lo"], max_codepoint=0x2FF).filter(
    lambda c: c.upper().lower() == c.lower()
)
WORD = st.text(LETTERS, min_size=2, max_size=8)
NAME = st.one_of(
    st.lists(WORD, min_size=1, max_size=3).map(" ".join),
    st.builds("{} {}".format, WORD, st.integers(2, 99)),  # Sam 2
    st.builds("{}{}{}".format, WORD, st.sampled_from("-'’"), WORD),  # Jean-Luc, O'Neil
)
RESERVED = {"and", "while", "is", "are", "must", "be", "none", "both", "all", "the", "an"}
PAIRS = st.sampled_from([*kk.ROLE_PAIRS, ("dragon", "elf")])


@st.composite
def puzzles(draw):
    """(people with their roles, the two words)."""
    key = lambda name: tuple(kk_words.tokens(name))  # noqa: E731
    names = draw(st.lists(NAME, min_size=2, max_size=9, unique_by=key))
    taken = RESERVED | {w for pair in kk.ROLE_PAIRS for w in pair}
    names = [name for name in names if not taken & {*key(name)}]
    pair = draw(PAIRS)
    roles = draw(st.lists(st.sampled_from(pair), min_size=len(names), max_size=len(names)))
    return [*zip(names, roles, strict=True)], pair


@settings(max_examples=400, deadline=None)
@given(puzzles(), st.data())
def test_any_rendering_of_the_solution_is_right_and_any_flipped_role_is_wrong(puzzle, data):
    people, pair = puzzle
    if len(people) < 2:
        return
    truth = ground_truth(people, knight_knave=dict(zip(("knight", "knave"), pair, strict=True)))
    write = STYLES[data.draw(st.sampled_from([*STYLES]))]
    assert totals(judge(write(people), truth)) == (3.0, True, True)
    i = data.draw(st.integers(0, len(people) - 1))
    name, role = people[i]
    flipped = [*people[:i], (name, pair[1 - pair.index(role)]), *people[i + 1 :]]
    assert totals(judge(write(flipped), truth)) == (-0.5, False, True)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_on_generated_puzzles(style):
    for n in (2, 5, 9, 14):
        for puzzle in itertools.islice(iter_puzzles(n, seed=5), 3):
            row = to_row(puzzle, "train")
            roles = ["knight" if knight else "knave" for knight in puzzle["solution"]]
            people = [*zip(puzzle["names"], roles, strict=True)]
            assert judge(STYLES[style](people), row["reward_model"]["ground_truth"]).reward == 3.0
            for i, (name, role) in enumerate(people):
                other = [*people[:i], (name, "knave" if role == "knight" else "knight"), *people[i + 1 :]]
                assert judge(STYLES[style](other), row["reward_model"]["ground_truth"]).reward == -0.5
