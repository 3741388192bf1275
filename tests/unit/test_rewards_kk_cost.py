"""What judging costs grows no faster than the text, whatever the text is."""

import math
import re
import sys
import time

import numpy as np
import pytest

from megatron_dump.rewards import format as tag_format
from megatron_dump.rewards import kk, kk_answer, kk_words, scale
from tests.unit.kk_styles import TRUTH


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
