"""Messages between a trainer's rank and its engine's process: a JSON head and numpy arrays, over a socket.

On the wire: the head's length (8 bytes, little-endian), the head, the arrays' bytes. The head's "arrays" lists their
types and shapes. Nothing is unpickled.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dump.rollout.engine import EngineOutput, EngineRequest

_LONGEST_HEAD = 64 << 20  # bytes; more is no head
_DTYPES = ("int64", "float32")
Message = tuple[dict[str, Any], list[np.ndarray]]


def send(connection: socket.socket, head: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write one message. OSError when the other side is gone, TimeoutError when it does not read."""
    shapes = [[array.dtype.name, *array.shape] for array in arrays]
    text = json.dumps({**head, "arrays": shapes}).encode()
    data = b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays)])
    connection.sendall(data)


def receive(connection: socket.socket) -> Message:
    """Read one message. EOFError when the other side is gone; ValueError when what it wrote is no message."""
    length = int.from_bytes(_exactly(connection, 8), "little")
    if length > _LONGEST_HEAD:
        raise ValueError(f"the engine's connection brought a head of {length} bytes: it is no message")
    head = json.loads(_exactly(connection, length))
    arrays = []
    for dtype, *shape in head.pop("arrays"):
        if dtype not in _DTYPES:
            raise ValueError(f"the engine's connection brought an array of {dtype}: only {', '.join(_DTYPES)} travel")
        count = int(np.prod(shape, dtype=np.int64))
        data = _exactly(connection, count * np.dtype(dtype).itemsize)
        arrays.append(np.frombuffer(data, dtype, count).reshape(shape))
    return head, arrays


def _exactly(connection: socket.socket, n: int) -> bytearray:
    data = bytearray(n)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError("the connection is closed")
        view = view[got:]
    return data


def pack_requests(requests: Sequence[EngineRequest]) -> list[np.ndarray]:
    """Prompts one behind the other, their lengths; seeds one behind the other, their counts: all int64."""
    return [
        _joined([r.prompt for r in requests], np.int64),
        np.array([len(r.prompt) for r in requests], np.int64),
        _joined([np.array(r.seeds, np.int64) for r in requests], np.int64),
        np.array([len(r.seeds) for r in requests], np.int64),
    ]


def unpack_requests(arrays: Sequence[np.ndarray]) -> list[EngineRequest]:
    prompts, seeds = _split(arrays[0], arrays[1]), _split(arrays[2], arrays[3])
    return [EngineRequest(p, tuple(s.tolist())) for p, s in zip(prompts, seeds, strict=True)]


def pack_outputs(groups: Sequence[Sequence[EngineOutput]]) -> list[np.ndarray]:
    """Tokens int64 and log-probabilities float32 one behind the other; int64 [N, 3] of length, finished and version;
    the number of outputs of each request."""
    outputs = [output for group in groups for output in group]
    heads = np.array([(len(o.token_ids), o.finished, o.policy_version) for o in outputs], np.int64).reshape(-1, 3)
    return [
        _joined([o.token_ids for o in outputs], np.int64),
        _joined([o.logprobs for o in outputs], np.float32),
        heads,
        np.array([len(group) for group in groups], np.int64),
    ]


def unpack_outputs(arrays: Sequence[np.ndarray]) -> list[list[EngineOutput]]:
    tokens, logprobs, heads, counts = arrays
    columns = zip(_split(tokens, heads[:, 0]), _split(logprobs, heads[:, 0]), heads.tolist(), strict=True)
    outputs = iter([EngineOutput(t, p, bool(finished), version) for t, p, (_, finished, version) in columns])
    return [[next(outputs) for _ in range(count)] for count in counts.tolist()]


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


def _split(array: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(array, np.cumsum(lengths)[:-1]) if len(lengths) else []
