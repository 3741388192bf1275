"""vLLM on the same work, run by the interpreter of an environment that has it; this project is not imported there.

python vllm_side.py MODEL WORK.json    # ready: a line of JSON; then for every line read: one run, a line of JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


class VLLMSide:
    """The other process, from this project's side."""

    def __init__(self, python: str, model: str, work_file: str) -> None:
        environment = {**os.environ, **ENVIRONMENT}
        environment.pop("PYTHONPATH", None)
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [python, __file__, model, work_file],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
        )
        self.version: str = self._read()["version"]

    def __call__(self) -> tuple[float, float, int]:
        """Seconds, CPU seconds of its process, tokens generated."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["cpu"], answer["tokens"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # vLLM prints lines of its own
            if line.startswith("{"):
                return json.loads(line)
        self._words.seek(0)
        raise RuntimeError(f"--vllm-python: the process ended:\n{self._words.read()[-2000:]}")


def _main() -> None:
    import torch
    import vllm

    model, work_file = sys.argv[1:]
    with open(work_file) as file:
        work = json.load(file)
    torch.set_num_threads(1)
    engine = vllm.LLM(
        model=model,
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
        max_num_seqs=512,
        skip_tokenizer_init=True,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=512 << 20,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )
    sampling = vllm.SamplingParams(
        n=work["samples"],
        temperature=1.0,
        top_p=1.0,
        logprobs=0,
        max_tokens=work["tokens"],
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in work["token_ids"]]
    print(json.dumps({"version": vllm.__version__}), flush=True)
    for _ in sys.stdin:
        engine.reset_prefix_cache()  # every run of a training step has new weights
        start, cpu = time.perf_counter(), time.process_time()
        found = engine.generate(prompts, sampling, use_tqdm=False)
        answer = {
            "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "tokens": sum(len(o.token_ids) for request in found for o in request.outputs),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
