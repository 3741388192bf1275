"""The engines of a pool: who serves, who is lost, and who is being restarted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from megatron_dump.engine_options import PoolOptions
from megatron_dump.rollout.engine import EngineHandle, EngineRefused
from megatron_dump.rollout.member import Member, State

log = logging.getLogger(__name__)


class PoolFailed(RuntimeError):
    """An engine could not be kept alive; the message names it, its last words and where its log is."""


class Crew:
    """Belongs to the pool's thread. What it cannot do itself it tells the pool:

    lost(member, words): it is given up; failed(error): it cannot be restarted once more.
    """

    def __init__(
        self,
        handles: Mapping[str, EngineHandle],
        options: PoolOptions,
        reload: Callable[[EngineHandle], None] | None,
        post: Callable[[Callable[[], None]], None],
        lost: Callable[[Member, str], None],
        failed: Callable[[PoolFailed], None],
    ) -> None:
        self.members = [Member(i, name, handle) for i, (name, handle) in enumerate(handles.items())]
        self.options, self.post = options, post
        self._reload, self._lost, self._failed = reload, lost, failed
        self.version: int | None = None  # of the weights that all must have
        self.needs_weights = False  # an engine that comes up serves only after it is given weights
        self.lazy = False  # the pool sleeps: who dies is restarted when it wakes
        self._next_look = 0.0

    def serving(self) -> list[int]:
        return [m.index for m in self.members if m.state is State.SERVING]

    def any_useful(self) -> bool:
        return any(m.useful for m in self.members)

    def expect(self, version: int | None) -> None:
        """From now on these weights are the right ones; None: no engine has any."""
        if version != self.version or version is None:
            for member in self.members:
                member.state = State.BARE if member.state is State.SERVING else member.state
                member.will_serve = False
        self.version, self.needs_weights = version, True

    def raise_dead(self, member: Member) -> None:
        """Restart it if it is dead and nobody has begun to."""
        if member.state is State.DOWN:
            self._start(member)
        elif member.state is not State.STARTING and not member.handle.alive():
            self.give_up(member, "it ended by itself")

    def next_event(self) -> float:
        """When the clock alone changes something."""
        return min([self._next_look, *(m.deadline for m in self.members if m.deadline is not None)])

    def watch(self) -> None:
        """Give up who is late or dead."""
        now = time.monotonic()
        for member in self.members:
            if member.deadline is None or now < member.deadline:
                continue
            if member.state is State.STARTING:
                self._failed(PoolFailed(f"{member.name} was not up after {self.options.start_timeout_s:g} s"))
                return
            self.give_up(member, f"no answer within {self.options.call_timeout_s:g} s: it hangs")
        if now < self._next_look:
            return
        self._next_look = now + self.options.health_interval_s
        for member in self.members:
            if member.state in (State.STARTING, State.DOWN) or member.handle.alive():
                member.suspected = False
            elif member.deadline is None or member.suspected:
                self.give_up(member, "it ended by itself")
            else:
                member.suspected = True  # its calls are about to fail, with its last words

    def give_up(self, member: Member, words: str) -> None:
        """It is of no use any more: restart it. Its answers, should some still come, are dropped."""
        member.given_up(words)
        self._lost(member, words)
        if not self.lazy:
            self._start(member)

    def _start(self, member: Member) -> None:
        limit = self.options.max_restarts
        if member.restarts >= limit:
            times = f"{member.restarts + 1} times, with max_restarts={limit}"
            self._failed(PoolFailed(f"{member.name} was lost {times}; the last time: {member.last_words}"))
            return
        member.restarts += 1
        log.warning("%s is restarted (%d of %d): %s", member.name, member.restarts, limit, member.last_words)
        reload = self._reload if self.version is not None else None
        member.state, member.will_serve = State.STARTING, reload is not None or not self.needs_weights
        member.within(self.options.start_timeout_s)

        def start() -> None:
            member.handle.restart()
            if reload is not None:
                reload(member.handle)

        member.ask(start, self.post, self._started)

    def _started(self, member: Member, _: None, error: BaseException | None) -> None:
        if isinstance(error, EngineRefused):
            self._failed(PoolFailed(f"{member.name} cannot be restarted: {error}"))
            return
        if error is not None:
            self.give_up(member, str(error))
            return
        member.deadline = None
        member.state = State.SERVING if member.will_serve else State.BARE
