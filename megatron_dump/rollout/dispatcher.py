"""The thread of an engine pool: deals requests out, carries out orders to all engines, and answers the callers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from megatron_dump.engine_options import PoolOptions
from megatron_dump.rollout.crew import Crew, PoolFailed
from megatron_dump.rollout.engine import EngineDied, EngineHandle, EngineOutput
from megatron_dump.rollout.event_thread import EventThread
from megatron_dump.rollout.member import Member, State
from megatron_dump.rollout.orders import Order
from megatron_dump.rollout.routing import Call, Piece, Router, split


class Dispatcher(EventThread):
    """See pool.EnginePool, whose calls it carries out."""

    def __init__(
        self,
        handles: Mapping[str, EngineHandle],
        options: PoolOptions,
        expected_tokens: float,
        reload: Callable[[EngineHandle], None] | None,
    ) -> None:
        super().__init__("engine pool")
        self.crew = Crew(handles, options, reload, self.post, self._lost, self._fail)
        self.options, self.expected_tokens = options, expected_tokens
        self.failure: Exception | None = None  # the answer to everything from now on
        self._router = Router(len(self.crew.members), options.min_chunk_tokens)
        self._queue: list[Call | Order] = []  # in the order they were made
        self._active: list[Call] = []  # the calls before the first Order: what the router deals out
        self._recovering: list[tuple[Sequence[Member], Future[None]]] = []  # who waits for whom to be up

    def accept(self, item: Call | Order) -> None:
        if self.failure is not None:
            item.future.set_exception(_again(self.failure))
        else:
            self._queue.append(item)

    def recover(self, members: Sequence[Member], done: Future[None]) -> None:
        """See EnginePool.restart."""
        if self.failure is not None:
            done.set_exception(_again(self.failure))
            return
        self._recovering.append((members, done))
        for order in [item for item in self._queue if isinstance(item, Order)]:
            for member in order.missing & {*members}:
                self.crew.give_up(member, f"{order.kind} was called off")
            if order in self._queue and not {*order.members} - {*members}:
                self._queue.remove(order)
                order.future.set_exception(EngineDied(f"{order.kind}: called off by a restart"))
        for member in members:
            self.crew.raise_dead(member)

    def close(self) -> None:
        if self.is_alive():
            self.post(lambda: self._fail(EngineDied("the engine pool is closed")))
            self.stop()
            for member in self.crew.members:
                member.close()
            for member in self.crew.members:
                member.join(self.options.start_timeout_s)

    # EventThread

    def broken(self, error: Exception) -> None:
        self._fail(PoolFailed(f"the engine pool's thread failed: {type(error).__name__}: {error}"))

    def deadline(self) -> float | None:
        return self.crew.next_event() if self.failure is None else None

    def advance(self) -> None:
        if self.failure is None:
            self.crew.watch()
        self._settle()
        earlier: list[Order] = []
        for item in self._queue:
            if isinstance(item, Call):
                if earlier:
                    break
                if item not in self._active:
                    self._activate(item)
            elif self._active or not (item.begun or self._begin(item, earlier)):
                break
            else:
                earlier.append(item)
        self._settle()
        self._deal()

    def _settle(self) -> None:
        """Answer everybody who can be answered."""
        for item in self._queue.copy():
            if isinstance(item, Call) and item in self._active and item.complete:
                self._finish(item)
            elif isinstance(item, Order) and item.done:
                self._queue.remove(item)
                self.crew.lazy = item.kind == "sleep" and not item.errors
                item.finish()
        for members, done in self._recovering.copy():
            if all(m.state in (State.SERVING, State.BARE) for m in members):
                self._recovering.remove((members, done))
                done.set_result(None)

    # calls

    def _activate(self, call: Call) -> None:
        self._active.append(call)
        self._router.waiting.extend(split(call, len(self.crew.members), self.expected_tokens))

    def _finish(self, call: Call) -> None:
        self._active.remove(call)
        self._queue.remove(call)
        answers = call.answers()
        lengths = [len(output.token_ids) for row in answers for output in row]
        if lengths:
            self.expected_tokens = sum(lengths) / len(lengths)
        call.future.set_result(answers)

    def _deal(self) -> None:
        serving = self.crew.serving()
        while (given := self._router.next(serving)) is not None:
            member, chunk = self.crew.members[given[0]], given[1]
            if member.deadline is None:
                member.within(self.options.call_timeout_s)
            requests = [piece.request for piece in chunk]
            member.ask(lambda m=member, r=requests: m.handle.generate(r), self.post, self._answered)
        if self._router.waiting and not self.crew.any_useful():
            words = "; ".join(f"{m.name}: {m.last_words}" for m in self.crew.members if m.last_words)
            for call in self._active.copy():
                self._drop(call, EngineDied(f"no engine has weights, load them again ({words or 'none were loaded'})"))

    def _answered(self, member: Member, outputs: Sequence[list[EngineOutput]], error: BaseException | None) -> None:
        if isinstance(error, EngineDied):
            self.crew.give_up(member, str(error))
            return
        hand = self._router.hands[member.index]
        if error is None and (nonsense := self._nonsense(hand[0], outputs)):
            self.crew.give_up(member, nonsense)
            return
        chunk = hand.popleft()
        member.deadline = None
        if hand:
            member.within(self.options.call_timeout_s)
        for i, piece in enumerate(chunk):
            if error is not None:  # the engine lives: it is the requests that are at fault
                self._drop(piece.call, error)
            else:
                piece.call.fill(piece, outputs[i])

    def _nonsense(self, chunk: Sequence[Piece], outputs: Sequence[list[EngineOutput]]) -> str | None:
        """What is wrong with an answer."""
        asked, given = [len(piece.request.seeds) for piece in chunk], [len(row) for row in outputs]
        if asked != given:
            return f"it answered with {given} completions, not {asked}"
        versions = {output.policy_version for row in outputs for output in row} - {self.crew.version}
        if self.crew.version is not None and versions:
            return f"it answered with weights of version {min(versions)}, not {self.crew.version}"
        return None

    def _drop(self, call: Call, error: BaseException) -> None:
        if call in self._active:
            self._active.remove(call)
            self._queue.remove(call)
            self._router.forget(call)
            call.future.set_exception(error)

    # orders

    def _begin(self, order: Order, earlier: Sequence[Order]) -> bool:
        """Pass it on, if that is possible yet."""
        if order.kind != "sleep":
            self.crew.lazy = False
            for member in order.members:
                if member.state is State.DOWN:
                    self.crew.raise_dead(member)
        if not order.goes_beside(earlier) or any(m.state is State.STARTING for m in order.members):
            return False
        order.begun = True
        if order.kind != "wake":
            self.crew.expect(order.version)
        for member in order.members:
            if order.kind in ("sleep", "wake") and member.asleep == (order.kind == "sleep"):
                continue  # as one that was restarted in between
            if order.kind != "wake":
                member.state = State.BARE
            order.missing.add(member)
            member.within(self.options.call_timeout_s)
            member.ask(
                lambda m=member: order.call(m.handle),
                self.post,
                lambda m, _, error: self._obeyed(order, m, error),
            )
        return True

    def _obeyed(self, order: Order, member: Member, error: BaseException | None) -> None:
        if error is not None:  # an engine whose call failed is of no use, whatever it was
            self.crew.give_up(member, str(error))
            return
        order.missing.discard(member)
        member.deadline = None
        if order.kind == "load_weights":
            member.state = State.SERVING
        else:
            member.asleep = order.kind == "sleep"

    # ends

    def _lost(self, member: Member, words: str) -> None:
        self._router.lose(member.index)
        for order in self._queue:
            if isinstance(order, Order):
                order.lost(member, words)

    def _fail(self, failure: Exception) -> None:
        """Everybody who waits, now or later, is told."""
        if self.failure is not None:
            return
        self.failure = failure
        self.crew.lazy = True  # nobody is restarted for a pool that is of no use
        for future in [*(item.future for item in self._queue), *(done for _, done in self._recovering)]:
            future.set_exception(_again(failure))
        self._queue.clear()
        self._active.clear()
        self._recovering.clear()
        self._router.waiting.clear()


def _again(failure: Exception) -> Exception:
    """For every caller an exception of its own: raising one adds to its traceback."""
    return type(failure)(str(failure))
