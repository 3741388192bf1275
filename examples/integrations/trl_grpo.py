"""TRL's GRPOTrainer with a curriculum over the data's sources, on Knights and Knaves:

    python examples/integrations/trl_grpo.py [--steps 40] [--out results/trl] [--model FOLDER] [--data FILE.parquet]

Needs trl 1.16 and, for the data, `make data`. Started again with more steps, it continues from the last checkpoint in
--out. On several processes: accelerate launch examples/integrations/trl_grpo.py …
"""

import argparse
import os

from datasets import load_dataset
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from megatron_dump.integrations.trl import CurriculumMixin
from megatron_dump.rewards import reward_fn

CURRICULUM = {
    "source_key": "data_source",
    "sources": {"name": "dump_ucb", "window": 300, "temperature": 0.1, "floor": 0.05},
    "correct_reward": 3.0,  # what kk gives to a right answer
}


class CurriculumGRPOTrainer(CurriculumMixin, GRPOTrainer):
    """GRPOTrainer whose steps are drawn by a curriculum."""


def kk(completions, reward_model, **columns) -> list[float]:
    """The reward of every completion: right or wrong, and its format."""
    judge = reward_fn("kk")
    return [judge(c[0]["content"], truth["ground_truth"]).reward for c, truth in zip(completions, reward_model)]


def main(argv: list[str] | None = None) -> CurriculumGRPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/models/kk-tiny")
    parser.add_argument("--data", default="data/kk/train.parquet")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="results/trl")
    args = parser.parse_args(argv)
    config = GRPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=192,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        temperature=1.0,
        logging_steps=1,
        save_steps=10,
        report_to="none",
        bf16=False,
    )
    data = load_dataset("parquet", data_files=args.data, split="train")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)  # AutoTokenizer makes another one of kk-tiny's
    trainer = CurriculumGRPOTrainer(args.model, kk, config, data, processing_class=tokenizer, curriculum=CURRICULUM)
    trainer.train(resume_from_checkpoint=os.path.isdir(args.out) and any(os.scandir(args.out)))
    return trainer


if __name__ == "__main__":
    main()
