"""Which of many failures came first, what kind it is, and which node it is to be laid to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rank_failures.records import Failure

# What ranks say when another one is gone, or does not answer.
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|connection (was )?(likely )?(closed|reset|refused|aborted)|broken pipe|pair closure"
    r"|remote process|ncclRemoteError|communicator was aborted|failed to recv|recvValue failed|sendBytes failed"
    r"|DistNetworkError|watchdog|tim(ed|e)[ -]?out|socket error|no route to host|SignalException|got signal: 15",
    re.IGNORECASE,
)
_ON_BEHALF = re.compile(r"rank (\d+) failed: (.*)", re.DOTALL)  # of one rank, on all: megatron_dump's fail_together
_GPU = re.compile(r"CUDA (driver )?error|cudaError|device-side assert|uncorrectable ECC|CUBLAS_|cuDNN error")
_KINDS = (
    (re.compile(r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory"), "GPU out of memory"),
    (_GPU, "CUDA error"),
    (re.compile(r"MemoryError|Cannot allocate memory|can't allocate memory"), "out of host memory"),
    (re.compile(r"No space left on device"), "disk full"),
)
_TOLD_TO_END = re.compile(r"SIGTERM|got signal: 15|CANCELLED")
_HOST_OOM = re.compile(r"oom[-_ ]kill|out of memory: kill", re.IGNORECASE)  # by slurmstepd or the kernel
SIGNAL, EXCEPTION, EXIT, LOST_PEER, ENDED = range(5)  # the lower, the rather a cause


def order(failure: Failure, lines: Sequence[str]) -> int:
    """How far a failure may be the cause of the others; `lines`: its node's log."""
    said = inner(failure)
    if failure.was_recorded:
        return LOST_PEER if _LOST_PEER.search(said) else EXCEPTION
    if failure.signal == "SIGTERM" or any(f"Unable to shutdown process {failure.pid} " in line for line in lines):
        return ENDED  # by torchrun or Slurm, after another one's failure
    if failure.signal == "SIGABRT" and any(_LOST_PEER.search(line) for line in own_lines(failure, lines)):
        return LOST_PEER  # NCCL's watchdog aborts ranks whose peers are gone
    return SIGNAL if failure.signal else EXIT


def first(failures: Sequence[Failure], logs: dict[str, list[str]]) -> Failure | None:
    """The failure that is the cause; the rank itself where others report on its behalf. None for no failures."""
    if not failures:
        return None
    ordered = sorted(
        failures, key=lambda f: (order(f, logs.get(f.host, [])), int(f.time), not f.is_first_of_node, f.time)
    )
    blamed = _ON_BEHALF.search(ordered[0].message)
    own = [f for f in failures if blamed and f.rank == int(blamed[1])]
    return own[0] if own else ordered[0]


def inner(failure: Failure) -> str:
    """The message without "rank 3 failed: " before it."""
    blamed = _ON_BEHALF.search(failure.message)
    return blamed[2] if blamed else failure.message


def kind(failure: Failure, lines: Sequence[str]) -> str | None:
    """What is generally known of such failures; None if nothing is."""
    if failure.signal == "SIGKILL":
        if any(_HOST_OOM.search(line) for line in lines):
            return "out of host memory: the kernel ended it"
        return "SIGKILL: often the kernel, out of host memory (dmesg of the node tells); or somebody's kill -9"
    if failure.signal in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE"):
        return f"{failure.signal}: a crash inside compiled code, or faulty memory"
    texts = [inner(failure), *(own_lines(failure, lines) if failure.signal else [])]
    return next((name for pattern, name in _KINDS if any(pattern.search(text) for text in texts)), None)


def node_at_fault(
    failure: Failure, failures: Sequence[Failure], logs: dict[str, list[str]], started: set[str]
) -> str | None:
    """The host to lay it to; None where it cannot be told. started: hosts whose torchrun made a folder for its ranks.

    Where all ranks only lost a peer, it is the one node that says nothing: neither a failure nor a signal to end.
    """
    blamed = _ON_BEHALF.search(failure.message)
    if blamed and failure.rank != int(blamed[1]):
        return None  # on behalf of a rank that nothing is known of
    if order(failure, logs.get(failure.host, [])) < LOST_PEER:
        return failure.host
    heard = {f.host for f in failures}
    silent = [h for h in sorted(started & logs.keys()) if h not in heard and not any(map(_TOLD_TO_END.search, logs[h]))]
    return silent[0] if len(silent) == 1 else None


def own_lines(failure: Failure, lines: Sequence[str]) -> list[str]:
    """What torch printed for this rank."""
    marks = (f"[rank{failure.rank}]:", f"[Rank {failure.rank}]")
    return [line for line in lines if any(mark in line for mark in marks)]
