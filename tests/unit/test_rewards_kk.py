"""The reward scores what an answer says, however it is rendered, and nothing that merely looks like it."""

import itertools
import json

import pytest

from kk.dataset import to_row
from kk.generate import iter_puzzles
from megatron_dump.rewards import GroundTruthError, kk, scale
from tests.unit.kk_styles import CLAUSES, PEOPLE, STYLES, TRUTH, article, ground_truth, judge, totals


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
        "right": GOOD,
        "wrong": GOOD.replace("knave", "knight"),
        "unreadable": GOOD.replace("Sam", "Tom"),
        "bad format": "",
    }
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
    "truth",
    [
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        '{"solution_text_format": 3}',
        '{"solution_text_format": ""}',
        '{"solution_text_format": "(1) Zoey is happy"}',
        '{"solution_text_format": "(1)  is a knave"}',
        '{"solution_text_format": "(2) Zoey is a knave"}',
        '{"solution_text_format": "(1) Zoey is a knave\\n(2) zoey is a knight"}',
        '{"solution_text_format": "(1) A is a knave\\n(2) B is a knight\\n(3) C is a spy"}',
    ],
)
def test_a_bad_ground_truth_is_the_data_sets_fault(truth):
    with pytest.raises(GroundTruthError, match="ground truth"):
        judge("Zoey is a knave", truth)
