"""Time of a weight push to an engine in a process of its own, over a plain copy of the same bytes.

    python tools/rollout_bench/sync.py --repeats 15

The engine copies every tensor into parameters of its own, as engines do. The plain copy does the same from the
parameters of an unsplit model in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from kk.progress import meter
from megatron_dump.actor import convert, parallel
from megatron_dump.actor.architecture import read_architecture
from megatron_dump.actor.model import build_model, transformer_config
from megatron_dump.actor.weight_stream import WeightStream
from megatron_dump.weight_sync import WeightSync, WeightSyncOptions, receive

MODELS = {  # name -> hidden, feed-forward, layers, vocabulary
    "3 M": (256, 704, 4, 1024),
    "25 M": (512, 1408, 8, 4096),
}
LAYOUTS = {"TP1": (1, 1), "TP2xPP2": (2, 2)}  # tensor, pipeline
TRANSPORTS = ("shared_memory", "broadcast")


@dataclasses.dataclass(frozen=True)
class Row:
    model: str
    megabytes: float
    layout: str
    transport: str
    push_ms: float  # medians
    memcpy_ms: float
    cpu_ms: float  # of all ranks and the engine, a push

    @property
    def ratio(self) -> float:
        return self.push_ms / self.memcpy_ms

    @property
    def cpu_ratio(self) -> float:
        """Against the plain copy's time, which is one process's CPU time: what a busy machine leaves comparable."""
        return self.cpu_ms / self.memcpy_ms


def run(
    models: Sequence[str] = tuple(MODELS),
    layouts: Sequence[str] = tuple(LAYOUTS),
    transports: Sequence[str] = TRANSPORTS,
    repeats: int = 15,
    bucket_mb: float = 256,
) -> list[Row]:
    """A row for each combination, in fp32; pushes and plain copies take turns."""
    context = multiprocessing.get_context("forkserver")  # nothing is inherited; what is imported, is imported once
    context.set_forkserver_preload([_measure.__module__ if __name__ != "__main__" else "megatron_dump.actor.convert"])
    rows, total = [], len(models) * len(layouts) * len(transports)
    with tempfile.TemporaryDirectory() as folder, meter("weight sync") as tell:
        for name in models:
            _write(os.path.join(folder, name), *MODELS[name])
        for layout in layouts:
            tensor, pipeline = LAYOUTS[layout]
            receiver, sender = context.Pipe(duplex=False)
            store = os.path.join(folder, f"store-{layout}")
            work = (folder, tuple(models), tuple(transports), repeats, bucket_mb)
            ranks = [
                context.Process(target=_rank, args=(rank, tensor, pipeline, store, work, sender))
                for rank in range(tensor * pipeline)
            ]
            for process in ranks:
                process.start()
            sender.close()
            with contextlib.suppress(EOFError):
                while True:
                    rows.append(Row(layout=layout, **receiver.recv()))
                    tell(len(rows), total)
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                raise RuntimeError(f"{layout}: a rank failed; see its traceback above")
    return rows


def table(rows: Sequence[Row]) -> str:
    columns = ("model", 6), ("MB", 6), ("layout", 8), ("transport", 14), ("push ms", 8), ("memcpy ms", 10), ("ratio", 6)
    lines = [" ".join(f"{name:>{width}}" for name, width in (*columns, ("CPU ms", 7), ("ratio", 6)))]
    for r in rows:
        what = f"{r.model:>6} {r.megabytes:6.1f} {r.layout:>8} {r.transport:>14}"
        lines.append(f"{what} {r.push_ms:8.1f} {r.memcpy_ms:10.1f} {r.ratio:6.2f} {r.cpu_ms:7.1f} {r.cpu_ratio:6.2f}")
    return "\n".join(lines)


def _write(path: str, hidden: int, feed_forward: int, layers: int, vocabulary: int) -> None:
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


def _rank(rank: int, tensor: int, pipeline: int, store: str, work: Any, sender: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = tensor * pipeline
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    engine = _Handle() if rank == 0 else None
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    grid = parallel.initialize(parallel.Layout(tensor=tensor, pipeline=pipeline, sequence=tensor > 1))
    folder, models, transports, repeats, bucket_mb = work
    for name in models:
        path = os.path.join(folder, name)
        arch = read_architecture(path, 8, tensor)
        modules = [build_model(arch, transformer_config(arch, grid, "32"), grid)]
        convert.load_hf(modules, arch, grid, path)
        weights = WeightStream(modules, arch, grid)
        plain = _Plain(path) if engine else None
        for transport in transports:
            options = WeightSyncOptions(transport=transport, bucket_mb=bucket_mb)
            sync = WeightSync(weights, [engine] if engine else [], options)
            before = _cpu_s(engine)
            pushes, copies = _measure(sync, plain, repeats)
            used = torch.tensor(_cpu_s(engine) - before - sum(copies))
            dist.all_reduce(used)
            sync.close()
            if plain is not None:
                sender.send(
                    {
                        "model": name,
                        "megabytes": plain.nbytes / 1e6,
                        "transport": transport,
                        "push_ms": 1e3 * statistics.median(pushes[2:]),
                        "memcpy_ms": 1e3 * statistics.median(copies[2:]),
                        "cpu_ms": 1e3 * float(used) / len(pushes),
                    }
                )
    if engine is not None:
        engine.close()
    dist.barrier()


def _measure(sync: WeightSync, plain: _Plain | None, repeats: int) -> tuple[list[float], list[float]]:
    pushes, copies = [], []
    for version in range(repeats + 2):  # the first two warm up
        dist.barrier()
        start = time.perf_counter()
        sync.push(version)
        pushes.append(time.perf_counter() - start)
        dist.barrier()
        if plain is not None:
            copies.append(plain.copy())
    return pushes, copies


def _cpu_s(engine: _Handle | None) -> float:
    """CPU seconds of this process, and of its engine."""
    return time.process_time() + (engine.cpu_s if engine else 0.0)


class _Plain:
    def __init__(self, path: str) -> None:
        model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._sources = [parameter.detach() for parameter in model.parameters()]
        self._copies = [source.clone() for source in self._sources]
        self.nbytes = sum(source.nbytes for source in self._sources)

    def copy(self) -> float:
        start = time.perf_counter()
        for copy, source in zip(self._copies, self._sources, strict=True):
            copy.copy_(source)
        return time.perf_counter() - start


class _Handle:
    """The engine's process behind a pipe."""

    def __init__(self) -> None:
        self.cpu_s = 0.0  # of the engine so far
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_engine, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def load_weights(self, version: int, link: dict[str, Any]) -> Future[None]:
        future: Future[None] = Future()
        threading.Thread(target=self._load, args=(future, link), daemon=True).start()
        return future

    def _load(self, future: Future[None], link: dict[str, Any]) -> None:
        try:
            self._pipe.send(link)
            error, self.cpu_s = self._pipe.recv()
            future.set_exception(RuntimeError(error)) if error else future.set_result(None)
        except (EOFError, OSError) as error:
            future.set_exception(error)

    def alive(self) -> bool:
        return self._process.is_alive()

    def restart(self) -> None:
        raise RuntimeError("the benchmark's engine failed")

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _engine(pipe: Any) -> None:
    parameters: dict[str, Tensor] = {}
    with contextlib.suppress(EOFError):
        while True:
            link, error = pipe.recv(), None
            try:
                for name, tensor in receive(link):
                    if name in parameters and parameters[name].shape == tensor.shape:
                        parameters[name].copy_(tensor)
                    else:
                        parameters[name] = tensor.clone()
            except Exception as caught:  # noqa: BLE001 - raised by the other side
                error = f"{type(caught).__name__}: {caught}"
            pipe.send((error, time.process_time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--bucket-mb", type=float, default=256)
    args = parser.parse_args()
    print(table(run(repeats=args.repeats, bucket_mb=args.bucket_mb)))


if __name__ == "__main__":
    main()
