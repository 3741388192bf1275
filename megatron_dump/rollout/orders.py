"""What engines of a pool are to do beside generating: load weights, sleep, wake."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from megatron_dump.rollout.engine import EngineDied, EngineHandle
from megatron_dump.rollout.member import Member


@dataclasses.dataclass(eq=False)
class Order:
    """To some of the engines, after everything asked for earlier is done, and before anything asked for later."""

    kind: str  # load_weights, sleep or wake
    members: Sequence[Member]
    call: Callable[[EngineHandle], Future[None]]
    version: int | None = None  # of the weights it loads
    future: Future[None] = dataclasses.field(default_factory=Future)
    begun: bool = False
    missing: set[Member] = dataclasses.field(default_factory=set)  # who has not done it yet
    errors: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()

    @property
    def done(self) -> bool:
        return self.begun and not self.missing

    def goes_beside(self, earlier: Sequence[Order]) -> bool:
        """Whether it need not wait for those: one stream of weights may come as an order to each engine."""
        mine = self.kind, self.version
        return all(mine == (o.kind, o.version) and not {*self.members} & {*o.members} for o in earlier)

    def lost(self, member: Member, words: str) -> None:
        if member in self.missing:
            self.missing.discard(member)
            self.errors.append(f"{member.name}: {words}")

    def finish(self) -> None:
        if self.errors:
            self.future.set_exception(EngineDied(f"{self.kind}: {'; '.join(self.errors)}"))
        else:
            self.future.set_result(None)
