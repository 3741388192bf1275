"""A random tiny model with a tokenizer, rows of two sources, and which draws a curriculum made."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

from megatron_dump.curriculum.codec import draw_from_json, outcomes_from_json
from megatron_dump.types import Draw, Outcomes

TOKENIZER = pathlib.Path(__file__).parents[2] / "examples" / "models" / "kk-tiny"
SOURCES = ("dull", "lively")


def write_model(path: pathlib.Path) -> str:
    """A Qwen2 of random weights, with kk-tiny's tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=81,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, path / name)
    return str(path)


def rows(n: int) -> list[dict[str, Any]]:
    """n rows, alternating between the sources; every eighth prompt is long."""
    return [
        {
            "prompt": [{"role": "user", "content": "Zoey is a knave. " * (12 if i % 8 == 5 else 1) + f"({i % 9})"}],
            "data_source": SOURCES[i % 2],
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i},
        }
        for i in range(n)
    ]


class Log:
    """What a curriculum drew and was told: `Curriculum.on_event`."""

    def __init__(self, curriculum: Any):
        self.order: list[str] = []
        self.draws: list[Draw] = []
        self.outcomes: list[Outcomes] = []
        curriculum.on_event = self._keep

    def _keep(self, event: dict[str, Any]) -> None:
        self.order.append(event["event"])
        if event["event"] == "draw":
            self.draws.append(draw_from_json(event["draw"]))
        else:
            self.outcomes.append(outcomes_from_json(event["outcomes"]))

    @property
    def rows(self) -> list[list[int]]:
        """[steps][P]"""
        return [draw.prompt_ids.tolist() for draw in self.draws]

    @property
    def weights(self) -> list[list[float]]:
        """[steps][K]"""
        return [draw.weights.tolist() for draw in self.draws]
