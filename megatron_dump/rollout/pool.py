"""Several engines as one: requests dealt out by load, dead engines replaced, every request answered exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from megatron_dump.engine_options import PoolOptions
from megatron_dump.rollout.dispatcher import Dispatcher
from megatron_dump.rollout.engine import EngineHandle, EngineOutput, EngineRequest
from megatron_dump.rollout.member import Member
from megatron_dump.rollout.orders import Order
from megatron_dump.rollout.routing import Call


class EnginePool:
    """An EngineHandle over EngineHandles: use it where one engine would do.

    - **Order.** Calls take effect in the order they are made, on all engines: `load_weights` begins when earlier
      `generate`s are answered, and later ones wait for it. Outputs come in the order of the requests, and as a seed
      decides a completion they are the same however requests were dealt out and whichever engines died.
    - **Death.** An engine that dies, hangs or answers nonsense is given up: the others get its requests at once, its
      late answers are dropped, and it is restarted in the background, at most `max_restarts` times. It serves again
      once it has the weights of the last `load_weights`: by `reload`, or without one at the next `load_weights`.
    - **Errors.** EngineDied: no engine is left that has weights, or one failed to load them; `restart`, load weights
      and try again. PoolFailed: an engine cannot be kept alive; every call raises it from then on.

    Any thread may call it.
    """

    def __init__(
        self,
        handles: Sequence[EngineHandle],
        options: PoolOptions | None = None,
        *,
        expected_tokens: float,
        reload: Callable[[EngineHandle], None] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """The pool owns the handles from now on. They are up; until the first `load_weights` they serve as they are.

        expected_tokens: of a completion, until some have been seen; reload: gives one engine the weights of the last
        `load_weights`, by itself, and returns when it has them (called in another thread).
        """
        if not handles:
            raise ValueError("a pool needs at least one engine")
        names = names or [f"engine {i}" for i in range(len(handles))]
        named = dict(zip(names, handles, strict=True))
        self._dispatcher = Dispatcher(named, options or PoolOptions(), expected_tokens, reload)
        self._members = self._dispatcher.crew.members
        self._dispatcher.start()

    def generate(self, requests: Sequence[EngineRequest]) -> Future[list[list[EngineOutput]]]:
        call = Call(list(requests))
        self._dispatcher.post(lambda: self._dispatcher.accept(call))
        return call.future

    def load_weights(self, version: int, link: dict[str, Any]) -> Future[None]:
        """All engines open the same `link`, at the same time; for links of their own there is `engines`."""
        return self._order("load_weights", lambda handle: handle.load_weights(version, link), version)

    def sleep(self) -> Future[None]:
        """Engines that die in their sleep are restarted by `wake`, not before: their memory is wanted elsewhere."""
        return self._order("sleep", lambda handle: handle.sleep())

    def wake(self) -> Future[None]:
        return self._order("wake", lambda handle: handle.wake())

    def alive(self) -> bool:
        """Some engine can answer, or will without being given weights; or sleeps."""
        return self._dispatcher.failure is None and any(member.useful or member.asleep for member in self._members)

    def restart(self) -> None:
        """Give up loads that are not done, and return when every engine is up, those that are well as they were.

        For the owner of the weights, before it pushes them again. PoolFailed.
        """
        self._recover(self._members)

    def close(self) -> None:
        """End all engines; calls without an answer raise EngineDied."""
        self._dispatcher.close()

    @property
    def engines(self) -> list[PooledEngine]:
        """Each by itself, for the owner of the weights."""
        return [PooledEngine(self, member) for member in self._members]

    @property
    def restarts(self) -> dict[str, int]:
        """How often each engine was restarted."""
        return {member.name: member.restarts for member in self._members}

    def _order(
        self,
        kind: str,
        call: Callable[[EngineHandle], Future[None]],
        version: int | None = None,
        members: Sequence[Member] = (),
    ) -> Future[None]:
        order = Order(kind, members or self._members, call, version)
        self._dispatcher.post(lambda: self._dispatcher.accept(order))
        return order.future

    def _recover(self, members: Sequence[Member]) -> None:
        done: Future[None] = Future()
        self._dispatcher.post(lambda: self._dispatcher.recover(members, done))
        done.result()

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PooledEngine:
    """One engine of a pool as its weights' owner sees it (weight_sync.WeightSync): the pool knows what it is given.

    Engines that get the same version one by one are given it at the same time.
    """

    def __init__(self, pool: EnginePool, member: Member) -> None:
        self._pool, self._member = pool, member
        self.name = member.name

    def load_weights(self, version: int, link: dict[str, Any]) -> Future[None]:
        return self._pool._order(
            "load_weights", lambda handle: handle.load_weights(version, link), version, [self._member]
        )

    def alive(self) -> bool:
        """It lives and has the weights of the last load, so a push of the same version may leave it out."""
        return self._member.useful

    def restart(self) -> None:
        """As EnginePool.restart, of this one."""
        self._pool._recover([self._member])
