"""Times TRL's GRPO steps; run by the interpreter of an environment with TRL, and not importing this project.

python trl_steps.py MODEL PROMPTS.json SETTINGS.json    # prints one line of JSON, last
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
import time
import warnings
import zlib

import torch
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def reward(completions: list[str], **_) -> list[float]:
    """Cheaper than any real one; differs inside a group, so that there is a gradient."""
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, prompts, settings = sys.argv[1], *(json.loads(pathlib.Path(path).read_text()) for path in sys.argv[2:4])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            shuffle_dataset=False,
            disable_tqdm=True,
            max_steps=settings["steps"],
            num_generations=settings["group"],
            generation_batch_size=settings["rows"],
            per_device_train_batch_size=settings["micro"],
            gradient_accumulation_steps=settings["rows"] // settings["micro"],
            max_completion_length=settings["max_length"],
            learning_rate=settings["lr"],
            beta=settings["kl_penalty"],
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            lr_scheduler_type="constant",
            model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"},
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            processing_class=tokenizer,
            callbacks=[watch],
            train_dataset=Dataset.from_dict({"prompt": prompts}),
        )
        trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    print(json.dumps({"seconds": watch.seconds, "lengths": lengths, "version": trl.__version__}))


if __name__ == "__main__":
    main()
