"""The tagged format: <think>…</think> … <answer>…</answer>, then an end-of-turn token at most. And its reward."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence

from megatron_dump.types import Score

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# An end-of-turn token, whatever the chat template: <|im_end|>, <|eot_id|>, <|return|>, Gemma's <end_of_turn>, Llama 2's
# </s>, Nemotron's <extra_id_1>, DeepSeek's <｜end▁of▁sentence｜> … But nothing that opens a turn.
_END_OF_TURN = re.compile(
    r"<\|(?!\w{0,48}(?:start|begin|header))[\w/.-]{1,48}\|>|<｜(?!begin|User|Assistant)[\w▁]{1,48}｜>"
    r"|</s>|<eos>|<end_of_turn>|<extra_id_\d+>|\[/?INST\]|\[e~\[",
    re.IGNORECASE,
)
# What only a chat template may write. Looked for outside the tags, in ASCII lower case without blanks and asterisks.
_FAKE_TURNS = tuple(
    mark.encode()
    for mark in (
        "<|",
        "<｜",
        "[inst]",
        "[/inst]",
        "<<sys>>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<eos>",
        "</s>",
        "assistant:",
        "user:",
        "human:",
        "system:",
        "###response",
        "###instruction",
    )
)
_MOST_OUTSIDE = 32_768  # characters
_LOWER = bytes.maketrans(string.ascii_uppercase.encode(), string.ascii_lowercase.encode())


class BadFormat(ValueError):
    """The tags are not where they belong; the message says which."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagFormat:
    """The format's options, which every reward that reads tags has.

    end_tokens: end-of-turn tokens besides those known; think_in_prompt: the chat template's generation prompt ends in
    <think>, so the completion begins inside of it.
    """

    end_tokens: Sequence[str] = ()
    think_in_prompt: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.end_tokens, str) or not all(isinstance(token, str) for token in self.end_tokens):
            raise ValueError(f'end_tokens: {self.end_tokens!r} must be a list of texts, as in ["<|im_end|>"]')
        if not isinstance(self.think_in_prompt, bool):
            raise ValueError(f"think_in_prompt: {self.think_in_prompt!r} must be true or false")

    def answer_of(self, text: str) -> str:
        """What stands in the answer tags. In time linear in the text.

        BadFormat unless each tag occurs once, in order, with nothing after the last but white space and at most one
        end-of-turn token, and no turn of another speaker before or between the two blocks.
        """
        if self.think_in_prompt:
            text = TAGS[0] + text
        for tag in TAGS:
            if (times := text.count(tag)) != 1:
                raise BadFormat(f"{tag} {times} times")
        opened, thought, answer, end = (text.find(tag) for tag in TAGS)
        if not opened < thought < answer < end:
            raise BadFormat("tags out of order")
        rest = text[end + len(TAGS[3]) :].strip()
        if rest and rest not in self.end_tokens and not _END_OF_TURN.fullmatch(rest):
            raise BadFormat("text after </answer>")
        outside = text[:opened] + "\n" + text[thought + len(TAGS[1]) : answer]
        if len(outside) > _MOST_OUTSIDE:  # bounds the searches below
            raise BadFormat(f"{len(outside)} characters outside the tags")
        plain = outside.encode(errors="replace").translate(_LOWER, b" *")
        if fake := next((mark for mark in _FAKE_TURNS if mark in plain), None):
            raise BadFormat(f"{fake.decode()!a} outside the tags")
        return text[answer + len(TAGS[2]) : end]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatReward(TagFormat):
    """1 for the format, else -1, whatever the answer: for sources whose answers nobody can check."""

    def __call__(self, text: str, ground_truth: str) -> Score:
        """`ground_truth` is not read. `correct` means well-formed here."""
        del ground_truth
        try:
            self.answer_of(text)
        except BadFormat as error:
            return Score(-1.0, False, False, f"bad format: {error}", {"format": -1.0})
        return Score(1.0, True, True, "right", {"format": 1.0})
