"""Who gets what: traces worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dump.rollout.engine import EngineOutput, EngineRequest
from megatron_dump.rollout.routing import Call, Router, split


def call_of(*shapes):
    """Of (prompt length, completions) pairs."""
    return Call([EngineRequest(np.zeros(length, np.int64), tuple(range(n))) for length, n in shapes])


def names(given):
    engine, chunk = given
    return engine, "".join("ABCDEFGH"[piece.index] for piece in chunk)


def test_a_chunk_goes_where_the_fewest_tokens_are_outstanding():
    call = call_of((10, 2), (5, 1), (5, 3), (10, 1), (10, 1), (0, 1))  # of 30, 15, 35, 20, 20 and 10 tokens
    router = Router(2, 0)
    router.waiting.extend(split(call, 2, 10.0))
    assert [piece.tokens for piece in router.waiting] == [30, 15, 35, 20, 20, 10]
    assert names(router.next([0, 1])) == (0, "A")  # a tie: the first; a chunk is of at most 130 / 8 tokens, or a group
    assert names(router.next([0, 1])) == (1, "B")
    assert names(router.next([0, 1])) == (1, "C")  # 30 against 15
    assert [router.outstanding(e) for e in (0, 1)] == [30, 50]
    assert names(router.next([0, 1])) == (0, "D")
    assert router.next([0, 1]) is None  # both have two chunks
    router.hands[1].popleft()  # engine 1 has answered B
    assert names(router.next([0, 1])) == (1, "E")
    router.lose(1)
    assert [piece.index for piece in router.waiting] == [2, 4, 5]
    assert router.next([0]) is None
    router.hands[0].popleft()
    assert names(router.next([0])) == (0, "C")
    router.forget(call)
    assert not router.waiting and router.outstanding(0) == 20 + 35


def test_chunks_shrink_as_less_is_left():
    router = Router(2, 0)
    router.waiting.extend(split(call_of(*[(0, 1)] * 32), 2, 10.0))
    sizes = []
    while (given := router.next([0, 1])) is not None:
        sizes.append(len(given[1]))
        router.hands[given[0]].clear()
    # an eighth of what waits: of 32, 28, 25, 22, 20, 18, 16, 14 and so on
    assert sizes == [4, 3, 3, 2, 2, 2, 2] + [1] * 14
    router = Router(2, 95)
    router.waiting.extend(split(call_of(*[(0, 1)] * 32), 2, 10.0))
    assert len(router.next([0, 1])[1]) == 9  # no message for less than 95 tokens


def test_a_single_engine_gets_everything_at_once():
    router = Router(1, 0)
    router.waiting.extend(split(call_of((3, 2), (5, 4), (1, 1)), 1, 10.0))
    assert names(router.next([0])) == (0, "ABC")


@pytest.mark.parametrize(
    ("shapes", "engines", "pieces"),
    [
        ([(4, 8)], 1, [(0, 0, 8)]),
        ([(4, 8)], 4, [(0, 0, 2), (0, 2, 2), (0, 4, 2), (0, 6, 2)]),
        ([(4, 3)], 4, [(0, 0, 1), (0, 1, 1), (0, 2, 1)]),
        ([(4, 2), (4, 2)], 2, [(0, 0, 2), (1, 0, 2)]),  # each is a share: no prompt is computed twice
        ([(4, 1), (4, 5)], 2, [(0, 0, 1), (1, 0, 3), (1, 3, 2)]),  # 14 and 54 of a share of 34
        ([(4, 0), (4, 1)], 2, [(1, 0, 1)]),
        ([], 2, []),
    ],
)
def test_a_group_is_split_only_if_it_is_more_than_a_share(shapes, engines, pieces):
    split_up = split(call_of(*shapes), engines, 10.0)
    assert [(p.index, p.first, len(p.request.seeds)) for p in split_up] == pieces


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), max_size=20), st.integers(1, 8), st.floats(0, 100))
def test_pieces_are_the_call(shapes, engines, expected_tokens):
    call = call_of(*shapes)
    pieces = split(call, engines, expected_tokens)
    seeds = [(p.index, p.first + i, seed) for p in pieces for i, seed in enumerate(p.request.seeds)]
    assert seeds == [(i, s, s) for i, (_, n) in enumerate(shapes) for s in range(n)]
    assert all(sum(p.index == i for p in pieces) <= engines for i in range(len(shapes)))


def test_a_completion_is_answered_once():
    call = call_of((1, 4))
    first, second = split(call, 2, 10.0)
    output = EngineOutput(np.zeros(1, np.int64), np.zeros(1, np.float32), True, 0)
    call.fill(second, [output, output])
    with pytest.raises(ValueError, match="request 0"):
        call.fill(second, [output, output])
    with pytest.raises(ValueError, match="request 0"):
        call.fill(first, [output])
    assert not call.complete
    call.fill(first, [output, output])
    assert call.complete and len(call.answers()[0]) == 4
