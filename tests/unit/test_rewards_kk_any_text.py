"""The kk reward on any text and any puzzle: nothing raises, nothing scores but the solution."""

import itertools
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kk.dataset import to_row
from kk.generate import iter_puzzles
from megatron_dump.rewards import format as tag_format
from megatron_dump.rewards import kk, kk_words
from tests.unit.kk_styles import CLAUSES, RIGHT, STYLES, TRUTH, ground_truth, judge, totals


def test_no_letter_passes_for_an_ascii_one():
    """All of Unicode: what the reader takes for ASCII text is ASCII, or a plain dash, arrow or quote."""
    mistaken = {
        chr(c)
        for c in range(0x80, sys.maxunicode + 1)
        if "".join(kk_words.tokens(chr(c))).isascii() and not chr(c).isspace() and not kk_words.impostors(chr(c))
    }
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
