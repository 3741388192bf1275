"""Weights from an engine's process to vLLM's workers, where tensor or pipeline parallelism makes them processes.

Each worker reads the same stream from a Unix socket of its own: safetensors files, each behind its length (8 bytes,
little-endian); length 0 ends it.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tempfile
import threading
from collections.abc import Iterator

import safetensors.torch
from torch import Tensor

_BATCH = 64 << 20  # bytes that travel together, at least: what is held besides the tensor that came last
_TIMEOUT_S = 600.0


@contextlib.contextmanager
def relay(weights: Iterator[tuple[str, Tensor]], n_workers: int) -> Iterator[str]:
    """Sends `weights` to whoever connects to the path it yields; what failed in doing so is raised at the end."""
    errors: list[Exception] = []
    with tempfile.TemporaryDirectory(prefix="megatron_dump_") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(folder, "weights")
        listener.bind(path)
        listener.listen(n_workers)
        listener.settimeout(_TIMEOUT_S)
        thread = threading.Thread(target=_serve, args=(listener, weights, n_workers, errors), daemon=True)
        thread.start()
        try:
            yield path
        except Exception as error:
            raise (errors[0] if errors else error) from error
        thread.join(_TIMEOUT_S)
    if errors:
        raise errors[0]


def relayed(path: str) -> Iterator[tuple[str, Tensor]]:
    """A worker's end. EOFError when the stream breaks off."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(path)
        stream = connection.makefile("rb")
        while length := int.from_bytes(_exactly(stream, 8), "little"):
            yield from safetensors.torch.load(_exactly(stream, length)).items()


def _serve(
    listener: socket.socket, weights: Iterator[tuple[str, Tensor]], n_workers: int, errors: list[Exception]
) -> None:
    with contextlib.ExitStack() as stack:
        try:
            workers = [stack.enter_context(listener.accept()[0]) for _ in range(n_workers)]
            for worker in workers:
                worker.settimeout(_TIMEOUT_S)
            for batch in _batches(weights):
                for worker in workers:
                    worker.sendall(len(batch).to_bytes(8, "little") + batch)
            for worker in workers:
                worker.sendall(bytes(8))
        except Exception as error:  # noqa: BLE001 - raised by relay
            errors.append(error)


def _batches(weights: Iterator[tuple[str, Tensor]]) -> Iterator[bytes]:
    batch: dict[str, Tensor] = {}
    for name, tensor in weights:
        batch[name] = tensor.cpu().clone()  # two names of one tensor are no safetensors file
        if sum(t.nbytes for t in batch.values()) >= _BATCH:
            yield safetensors.torch.save(batch)
            batch = {}
    if batch:
        yield safetensors.torch.save(batch)


def _exactly(stream: io.BufferedReader, n: int) -> bytes:
    data = stream.read(n)
    if len(data) < n:
        raise EOFError("the stream of weights broke off: the engine's process says why")
    return data
