"""The process of an engine: `python -m megatron_dump.rollout.engine_main SOCKET PARENT`, started by engine_process.py.

The first message names the engine's class and its options; each of the following is a call, answered in order with
{"ok": true} or {"error": why, "refused": it would fail again}. A failed call ends the process, a refused one does not.
Megatron is not imported.
"""

from __future__ import annotations

import importlib
import os
import queue
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from megatron_dump.rollout import frames
from megatron_dump.rollout.engine import Engine, EngineRefused


def main() -> int:
    """Serve until told to close, a call fails, or the parent is gone."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    calls: queue.SimpleQueue[frames.Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, calls, int(sys.argv[2])), daemon=True).start()
    try:
        setup, _ = calls.get()
        engine = _build(setup["factory"], setup["options"])
        frames.send(connection, {"ok": True})
        while True:
            head, arrays = calls.get()
            if head["call"] == "close":
                engine.close()
                return 0
            try:
                answer = _answer(engine, head, arrays)
            except EngineRefused as error:
                frames.send(connection, {"error": str(error), "refused": True})
            else:
                frames.send(connection, {"ok": True}, answer)
    except Exception as error:  # noqa: BLE001  the parent tells the user, whatever it is
        traceback.print_exc()
        refused = isinstance(error, EngineRefused)
        words = str(error) if refused else f"{type(error).__name__}: {error}"
        frames.send(connection, {"error": words, "refused": refused})
        return 1


def _listen(connection: socket.socket, calls: queue.SimpleQueue[frames.Message], parent: int) -> None:
    """Calls wait here, not in the socket, so the parent's writes never block; its end is seen while we compute.

    No parent-death signal: it would end this process alone, and leave those that the engine has started.
    """
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    try:
        while os.getppid() == parent:  # a fork of the parent may hold the other end open
            if poller.poll(1000):
                calls.put(frames.receive(connection))
    except (EOFError, OSError):
        pass
    os.killpg(0, signal.SIGKILL)  # this process leads it, so that its own children end too


def _build(factory: str, options: dict[str, Any]) -> Engine:
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)(**options)


def _answer(engine: Engine, head: dict[str, Any], arrays: list[Any]) -> list[Any]:
    call = head["call"]
    if call == "generate":
        return frames.pack_outputs(engine.generate(frames.unpack_requests(arrays)))
    if call == "load_weights":
        from megatron_dump.weight_sync import receive

        engine.load_weights(head["version"], receive(head["link"]))
    elif call == "sleep":
        engine.sleep()
    elif call == "wake":
        engine.wake()
    elif call != "ping":
        raise ValueError(f"the engine was asked to {call!r}, which it does not know")
    return []


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an engine's own threads may not end
