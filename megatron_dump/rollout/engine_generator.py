"""Generation by an engine outside the training processes; the replica's lead drives it, the others receive.

The engine is anything that looks like an EngineHandle: one process, or a pool of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import numpy as np

from megatron_dump.distributed import Replica, all_gather_array, fail_together
from megatron_dump.gather import gather_completions
from megatron_dump.rollout import Request
from megatron_dump.rollout.engine import EngineDied, EngineHandle, EngineOutput, EngineRequest
from megatron_dump.rollout.sampling import request_seed
from megatron_dump.types import Completion

_DEATHS = 3  # of an engine over the same requests, before they are given up
_Answers = list[list[EngineOutput]]


class EngineGenerator:
    """A Generator and AsyncGenerator; all ranks of the run call it alike, with their replica's requests or none.

    engine: on the replica's lead; None on the others. renew: restarts engines that are not alive and gives them the
    present weights, a collective of all ranks (WeightSync.push). decode: token ids -> text; None: texts are left
    empty. An engine that dies loses nothing: what it was asked
    for is asked again, and the seeds make it the same on the same weights.
    """

    def __init__(
        self,
        engine: EngineHandle | None,
        replica: Replica,
        seed: int,
        decode: Callable[[list[int]], str] | None,
        renew: Callable[[], None],
    ) -> None:
        self.engine, self.replica, self.seed, self.decode, self.renew = engine, replica, seed, decode, renew
        self._asked: list[Future[_Answers]] = []

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        return self.submit(step, requests).result()

    def submit(self, step: int, requests: Sequence[Request]) -> EnginePending:
        return EnginePending(self, step, requests)

    def drain(self) -> None:
        """Returns when everything asked for is answered, or lost. No collective."""
        wait(self._asked)

    def ask(self, requests: Sequence[EngineRequest]) -> Future[_Answers] | None:
        """None on ranks that drive no engine."""
        if self.engine is None or not requests:
            return None
        future = self.engine.generate(requests)
        self._asked = [f for f in self._asked if not f.done()] + [future]
        return future


def with_text(decode: Callable[[list[int]], str], completion: Completion) -> Completion:
    """The completion, decoded."""
    ids = completion.token_ids[: len(completion.token_ids) - completion.finished]
    return dataclasses.replace(completion, text=decode(ids.tolist()))


class EnginePending:
    """Completions that an engine is working on."""

    def __init__(self, generator: EngineGenerator, step: int, requests: Sequence[Request]) -> None:
        self._generator, self._requests = generator, list(requests)
        self._asked = [
            EngineRequest(
                r.prompt.token_ids,
                tuple(request_seed(generator.seed, step, r.group_id, sample) for sample in r.samples),
            )
            for r in self._requests
        ]
        self._future = generator.ask(self._asked)

    def result(self) -> list[Completion]:
        """Waits. A collective of all ranks; RuntimeError on every rank when an engine cannot be brought back."""
        replica, device = self._generator.replica, self._generator.replica.device
        mine: list[Completion] = []
        for deaths in range(_DEATHS + 1):
            died = None
            with fail_together("generation", device=device):
                try:
                    mine = self._completions(self._future.result()) if self._future else []
                except EngineDied as error:
                    if deaths == _DEATHS:
                        raise
                    died = error
            lost = all_gather_array(np.array([died is not None, died is not None and not self._alive()]), None, device)
            if not lost.any():
                break
            if lost[:, 1].any():  # else only the requests were lost: another Pending has brought the engine back
                self._generator.renew()
            if died is not None:
                self._future = self._generator.ask(self._asked)
        if replica.ranks is not None:
            mine = gather_completions(mine, replica.ranks, device)
        found = {(c.group_id, c.sample): c for c in mine}
        ordered, decode = [found[r.group_id, s] for r in self._requests for s in r.samples], self._generator.decode
        return [with_text(decode, completion) for completion in ordered] if decode else ordered

    def _alive(self) -> bool:
        engine = self._generator.engine
        return engine is None or engine.alive()

    def _completions(self, answers: _Answers) -> list[Completion]:
        return [
            Completion(r.group_id, sample, output.token_ids, output.logprobs, output.finished, output.policy_version)
            for r, outputs in zip(self._requests, answers, strict=True)
            for sample, output in zip(r.samples, outputs, strict=True)
        ]
