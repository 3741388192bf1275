"""Make examples/models/kk-tiny: a small Qwen2 trained on hasty worked solutions of Knights and Knaves puzzles.

    python tools/warmstart.py --out FOLDER --steps 3000

examples/models/kk-tiny/README.md has the commands that made it.
Supervised training runs through the same Megatron actor as GRPO: the gradient of a demonstration's log-likelihood is
the policy gradient with advantage 1. Puzzles are generated as they are needed, from the training side of the split.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import pathlib
import random
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from kk.generate import iter_puzzles
from kk.text import NAMES
from kk.trace import worked_solution
from megatron_dump.actor import convert, parallel
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.batching import pad_rollouts
from megatron_dump.config import load
from megatron_dump.types import Completion

END = "<|endoftext|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PHRASES = (
    "A very special island is inhabited only by knights and knaves. "
    "Knights always tell the truth, and knaves always lie.",
    "So who is a knight and who is a knave?",
    *("You meet", "inhabitants:", 'said, "', '."', ", and", ",", ".", "and", "or", "if and only if", "If", "then"),
    *("<think>", "</think>", "<answer>", "</answer>", "try", ":", "true", "false", "ok", "no"),
)


def build_tokenizer(n_names: int, max_people: int) -> PreTrainedTokenizerFast:
    """Words and fixed phrases of the puzzles as single tokens ("Zoey is not a knave" is one)."""
    clauses = [f"{n} is {x}a {r}" for n in NAMES[:n_names] for x in ("", "not ") for r in ("knight", "knave")]
    counts = [str(i) for i in range(2, max_people + 1)]
    words = [END, "<unk>", *PHRASES, *counts, *(f"({i})" for i in range(1, max_people + 1)), *NAMES[:n_names], *clauses]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    longest_first = sorted(words[2:], key=len, reverse=True)
    escape = str.maketrans({c: "\\" + c for c in ".?()|"})
    pattern = "|".join(w.translate(escape) for w in longest_first) + r"|\S+"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def random_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, path: str) -> None:
    """A Qwen2 folder with weights drawn from the seed."""
    torch.manual_seed(args.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


class Demonstrations:
    """An endless stream of (prompt, completion) token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
        self.tokenizer, self.haste, self.quoted = tokenizer, args.haste, args.quoted
        self.rng = random.Random(args.seed)
        self.weights = {int(n): float(w) for n, w in (pair.split(":") for pair in args.mix.split(","))}
        self.puzzles = {n: self._puzzles(n, args.seed) for n in self.weights}
        self.max_length = args.max_length

    @staticmethod
    def _puzzles(n: int, seed: int) -> Iterator[dict]:
        for epoch in itertools.count():  # two people have finitely many puzzles
            yield from iter_puzzles(n, seed + epoch, names=8, frames=1, split="train")

    def __next__(self) -> tuple[np.ndarray, Completion]:
        (n,) = self.rng.choices(list(self.weights), list(self.weights.values()))
        row = next(self.puzzles[n])
        text = worked_solution(ast.literal_eval(row["statements"]), row["names"], self.rng, self.haste, self.quoted)
        prompt = self.tokenizer(row["quiz"])["input_ids"]
        ids = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id][: self.max_length]
        tokens = np.array(ids)
        completion = Completion(0, 0, tokens, np.zeros(len(tokens), np.float32), True, 0)
        return np.array(prompt), completion


def train(args: argparse.Namespace, start: str, out: pathlib.Path) -> list[dict]:
    grid = parallel.initialize(seed=args.seed)
    config = load(
        OmegaConf.create(
            {
                "trainer": {
                    "grpo": {
                        "max_steps": args.steps,
                        "num_prompts_per_grpo_step": args.batch_size // 2,
                        "samples_per_prompt": 2,
                        "initial_policy_kl_penalty": 0.0,
                    }
                },
                "pretrained_checkpoint": {"restore_from_path": start},
                "model": {
                    "micro_batch_size": args.micro_batch_size,
                    "global_batch_size": args.batch_size,
                    "make_vocab_size_divisible_by": 8,
                    "data": {"train_files": ["generated"]},
                    "optim": {
                        "lr": args.lr,
                        "weight_decay": 0.1,
                        "betas": [0.9, 0.98],
                        "sched": {"name": "cosine", "warmup_steps": args.warmup_steps, "min_lr": args.lr / 20},
                    },
                },
                "exp_manager": {"explicit_log_dir": "unused"},
            }
        )
    )
    actor = MegatronGPTGRPOActor(config, grid)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    stream, log, began = Demonstrations(tokenizer, args), [], time.monotonic()
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}"), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        last = args.stop_at or args.steps
        task = progress.add_task("warm start", total=last)
        for step in range(1, last + 1):
            metrics = actor.train_step(_batch(stream, args))
            progress.update(task, advance=1, description=f"loss {-metrics['actor/logprobs']:.4f}")
            if step % 50 == 0:
                log.append(
                    {
                        "step": step,
                        "loss": -metrics["actor/logprobs"],
                        "grad_norm": metrics["actor/grad_norm"],
                        "seconds": time.monotonic() - began,
                    }
                )
                print(json.dumps(log[-1]), flush=True)
            if step % 500 == 0 or step == last:
                convert.save_hf(actor.modules, actor.arch, grid, str(out), source=start, replace=True)
    return log


def _batch(stream: Demonstrations, args: argparse.Namespace):
    pool = sorted(
        (next(stream) for _ in range(args.batch_size)), key=lambda pair: len(pair[0]) + len(pair[1].token_ids)
    )
    prompts, completions = zip(*pool, strict=True)
    tokens = sum(len(c.token_ids) for c in completions)
    return pad_rollouts(prompts, completions, np.ones(len(pool)), float(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--start", help="continue from this folder instead of random weights")
    parser.add_argument("--steps", type=int, default=3000, help="length of the learning-rate schedule")
    parser.add_argument("--stop-at", type=int, help="stop after so many steps of it")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--micro-batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--mix", default="2:1,3:1", help="people:weight pairs of the demonstrations")
    parser.add_argument("--haste", type=float, default=0.25, help="probability of giving up after a failed trial")
    parser.add_argument("--quoted", action="store_true", help="demonstrations quote what they judge (kk/trace.py)")
    parser.add_argument("--max-length", type=int, default=224, help="tokens of a demonstration that are learned")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--ffn-hidden-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty: give a new folder")
    with tempfile.TemporaryDirectory() as folder:
        if not args.start:
            random_model(build_tokenizer(8, 8), args, folder)
        log = train(args, args.start or folder, args.out)
    (args.out / "warmstart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


if __name__ == "__main__":
    main()
