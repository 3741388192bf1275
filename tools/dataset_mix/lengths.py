"""How long prompts are: in tokens as training counts them, or in characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import TemplateError

from dataset_mix.inputs import Row
from kk.files import Unread

Measure = Callable[[Sequence[Row]], list[int | Unread]]


def characters(rows: Sequence[Row]) -> list[int | Unread]:
    """Characters of each row's messages."""
    return [sum(len(message["content"]) for message in row.messages) for row in rows]


def in_tokens(folder: Path) -> Measure:
    """Tokens of each prompt with the chat template of the tokenizer in `folder`, as training applies it.

    Errors name the option --tokenizer. A row that the template refuses is Unread.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"--tokenizer {folder}: no tokenizer.json there; give a Hugging Face model folder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise ValueError(f"--tokenizer {folder}: it has no chat template; add chat_template.jinja")

    def template(row: Row) -> str | Unread:
        try:
            text = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            return Unread(f"the chat template of {folder} refuses its messages: {error}")
        return str(text)

    def measure(rows: Sequence[Row]) -> list[int | Unread]:
        texts = [template(row) for row in rows]
        good = [text for text in texts if isinstance(text, str)]
        counts = iter(tokenizer(good, add_special_tokens=False)["input_ids"] if good else [])
        return [len(next(counts)) if isinstance(text, str) else text for text in texts]

    return measure
