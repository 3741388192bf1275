"""Which engine computes which requests: pieces of requests, dealt out to the engine with the least before it.

No threads, no clock and no engines: pool.py acts on what the Router says.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Sequence
from concurrent.futures import Future

from megatron_dump.rollout.engine import EngineOutput, EngineRequest

_DEPTH = 2  # chunks an engine has in hand: the one it computes, and the next, so that it never waits for one
_ROUNDS = 4  # a chunk is this part of an engine's share of what waits


class Call:
    """One `generate` of the pool: its answers come in pieces, each once."""

    def __init__(self, requests: Sequence[EngineRequest]) -> None:
        self.requests = requests
        self.future: Future[list[list[EngineOutput]]] = Future()
        self.future.set_running_or_notify_cancel()  # what engines compute is not called back
        self._answers: list[list[EngineOutput | None]] = [[None] * len(r.seeds) for r in requests]
        self._missing = sum(len(r.seeds) for r in requests)

    @property
    def complete(self) -> bool:
        return not self._missing

    def fill(self, piece: Piece, outputs: Sequence[EngineOutput]) -> None:
        """ValueError if any of them is there already, or one is missing."""
        places = range(piece.first, piece.first + len(piece.request.seeds))
        answers = self._answers[piece.index]
        if len(outputs) != len(places) or any(answers[place] is not None for place in places):
            raise ValueError(f"request {piece.index}: {len(outputs)} answers for its completions {places}")
        for place, output in zip(places, outputs, strict=True):
            answers[place] = output
        self._missing -= len(places)

    def answers(self) -> list[list[EngineOutput]]:
        """In the order of `requests` and of their seeds, whoever computed them."""
        return [[output for output in row if output is not None] for row in self._answers]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Completions of one request that one engine computes together."""

    call: Call
    index: int  # of the request in its call
    first: int  # of its seeds
    request: EngineRequest  # with the seeds of this piece alone
    tokens: int  # expected: of the prompt and of all completions


def split(call: Call, engines: int, expected_tokens: float) -> list[Piece]:
    """A call's requests as pieces, in order.

    A group stays whole, so that its prompt is computed once, unless it alone is more than one engine's share of the
    call; then it makes at most one piece an engine. expected_tokens: of one completion.
    """

    def tokens(request: EngineRequest, n: int) -> int:
        return len(request.prompt) + round(n * expected_tokens)

    share = sum(tokens(r, len(r.seeds)) for r in call.requests) / engines
    pieces = []
    for index, request in enumerate(call.requests):
        n = len(request.seeds)
        parts = 1
        while parts < min(engines, n) and tokens(request, -(-n // parts)) > share:
            parts += 1
        size = -(-n // parts) or 1
        for first in range(0, n, size):
            part = dataclasses.replace(request, seeds=request.seeds[first : first + size])
            pieces.append(Piece(call, index, first, part, tokens(part, len(part.seeds))))
    return pieces


class Router:
    """What waits, and what every engine has in hand."""

    def __init__(self, engines: int, min_chunk_tokens: int) -> None:
        self.engines, self.min_chunk_tokens = engines, min_chunk_tokens
        self.waiting: collections.deque[Piece] = collections.deque()
        self.hands: list[collections.deque[list[Piece]]] = [collections.deque() for _ in range(engines)]

    def outstanding(self, engine: int) -> int:
        """Tokens it has been given and not answered."""
        return sum(piece.tokens for chunk in self.hands[engine] for piece in chunk)

    def next(self, serving: Collection[int]) -> tuple[int, list[Piece]] | None:
        """Deal out a chunk: to whom, and what; None when nothing waits or nobody has a hand free.

        Chunks get smaller as less is left (guided self-scheduling, Polychronopoulos and Kuck 1987), so that a slow
        engine never holds much that the others could do. A single engine gets everything at once.
        """
        free = [engine for engine in sorted(serving) if len(self.hands[engine]) < _DEPTH]
        if not self.waiting or not free:
            return None
        engine = min(free, key=self.outstanding)
        wanted = sum(piece.tokens for piece in self.waiting)
        if self.engines > 1:
            wanted = max(self.min_chunk_tokens, wanted / (self.engines * _ROUNDS))
        chunk = [self.waiting.popleft()]
        tokens = chunk[0].tokens
        while self.waiting and tokens + self.waiting[0].tokens <= wanted:
            chunk.append(self.waiting.popleft())
            tokens += chunk[-1].tokens
        self.hands[engine].append(chunk)
        return engine, chunk

    def lose(self, engine: int) -> None:
        """What it had in hand waits again, before everything else."""
        lost = [piece for chunk in self.hands[engine] for piece in chunk]
        self.hands[engine].clear()
        self.waiting.extendleft(reversed(lost))

    def forget(self, call: Call) -> None:
        """Nobody waits for it any more; answers on their way are still taken."""
        self.waiting = collections.deque(piece for piece in self.waiting if piece.call is not call)
