"""Messages over a stream socket: JSON behind its length, with an open file where one is passed."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

_HEAD = struct.Struct("<Q")
_LONGEST = 1 << 30  # bytes of a message


def send(connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    body = json.dumps(message).encode()
    whole = _HEAD.pack(len(body)) + body
    if rest := whole[socket.send_fds(connection, [whole], [] if fd is None else [fd]) :]:
        connection.sendall(rest)


def read(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """The next message and its file. ConnectionError at the end of the stream, TimeoutError after the socket's."""
    head, fds, _, _ = socket.recv_fds(connection, _HEAD.size, 1)
    try:
        head += _exactly(connection, _HEAD.size - len(head)) if head else b""
        if not head:
            raise ConnectionError("closed")
        (length,) = _HEAD.unpack(head)
        if length > _LONGEST:
            raise ConnectionError(f"a message of {length} bytes")
        return json.loads(_exactly(connection, length)), fds[0] if fds else None
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _exactly(connection: socket.socket, n: int) -> bytes:
    parts = []
    while n:
        part = connection.recv(min(n, 1 << 20))
        if not part:
            raise ConnectionError("closed in the middle of a message")
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
