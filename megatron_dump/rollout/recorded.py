"""Completions written to disk and read again: the same rollouts under another layout or algorithm."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from megatron_dump.rollout import AsyncGenerator, Pending, Request
from megatron_dump.types import Completion


class RecordingGenerator:
    """Passes another generator's completions on and keeps them in FOLDER/step_<step>_<share>_<first group>.jsonl.

    `share` names this rank's part of the step; None: another rank of the replica writes it.
    """

    def __init__(self, generator: AsyncGenerator, folder: str, share: int | None) -> None:
        self.generator, self.folder, self.share = generator, pathlib.Path(folder), share

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        return self._keep(step, requests, self.generator.generate(step, requests))

    def submit(self, step: int, requests: Sequence[Request]) -> _Recording:
        return _Recording(self, step, requests, self.generator.submit(step, requests))

    def _keep(self, step: int, requests: Sequence[Request], completions: list[Completion]) -> list[Completion]:
        if self.share is not None and requests:
            prompts = {r.group_id: r.prompt.index for r in requests}
            rows = [_row(c, prompts[c.group_id]) for c in completions]
            self.folder.mkdir(parents=True, exist_ok=True)
            # a step may have several rounds
            path = self.folder / f"step_{step}_{self.share}_{requests[0].group_id}.jsonl"
            path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(path.with_suffix(".tmp"), path)
        return completions


@dataclasses.dataclass(frozen=True)
class _Recording:
    recorder: RecordingGenerator
    step: int
    requests: Sequence[Request]
    pending: Pending

    def result(self) -> list[Completion]:
        return self.recorder._keep(self.step, self.requests, self.pending.result())


class RecordedGenerator:
    """A Generator that answers from a folder that RecordingGenerator wrote."""

    def __init__(self, folder: str, decode: Callable[[list[int]], str]) -> None:
        self.folder, self.decode = pathlib.Path(folder), decode
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"trainer.grpo.inference_backend.path={folder}: no such folder; record one with "
                f"trainer.grpo.inference_backend.record={folder}"
            )

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        rows = {}
        for path in sorted(self.folder.glob(f"step_{step}_*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                key = (row["group_id"], row["prompt_id"], row["sample"])
                if key in rows:
                    raise ValueError(
                        f"trainer.grpo.inference_backend.path={self.folder}: step {step} has two recordings of group "
                        f"{key[0]}, sample {key[2]}; record into an empty folder"
                    )
                rows[key] = row
        return [self._completion(rows, step, r, sample) for r in requests for sample in r.samples]

    def _completion(
        self, rows: dict[tuple[int, int, int], dict], step: int, request: Request, sample: int
    ) -> Completion:
        key = (request.group_id, request.prompt.index, sample)
        if key not in rows:
            raise ValueError(
                f"trainer.grpo.inference_backend.path={self.folder}: step {step} has no completion {sample} of prompt "
                f"{request.prompt.index} in group {request.group_id}; the recording is of another draw"
            )
        row = rows[key]
        ids = row["token_ids"]
        return Completion(
            group_id=request.group_id,
            sample=sample,
            token_ids=np.array(ids, np.int64),
            logprobs=np.array(row["logprobs"], np.float32),
            finished=row["finished"],
            policy_version=row["policy_version"],
            text=self.decode(ids[: len(ids) - row["finished"]]),
        )


def _row(completion: Completion, prompt_id: int) -> dict[str, object]:
    return {
        "group_id": completion.group_id,
        "prompt_id": prompt_id,
        "sample": completion.sample,
        "token_ids": completion.token_ids.tolist(),
        "logprobs": [float(x) for x in completion.logprobs],
        "finished": completion.finished,
        "policy_version": completion.policy_version,
    }
