"""Rollouts that begin alike, as one sequence that holds each prompt once: what a micro-batch's layers compute.

The n rollouts of a group have their prompt in common, and under a causal mask its states do not depend on what follows.
So they are computed once, and the gradients of all n completions meet in them (idea: Prefix Grouper, 2506.05433). The
sequence has no padding but at its end: prompts and completions stand one behind the other, and only the attention
(shared_attention.py) puts them into rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

PAYS = 0.8  # of the tokens at most: with less to save, rows by themselves are as fast


@dataclasses.dataclass(frozen=True)
class Beginnings:
    """Which rows of a batch begin alike, [N] each. A row without a sampled token needs nothing computed."""

    group: np.ndarray  # int64, rows with the same prompt have the same number; -1: no sampled token
    prompt: np.ndarray  # int64, tokens in front of the first sampled one, at least 1; 0 in group -1
    own: np.ndarray  # int64, tokens from there on but the last, which nothing follows

    def pays(self, parts: Sequence[np.ndarray]) -> bool:
        """Is it worth while to compute each prompt once in each of these micro-batches?"""
        shared = sum(self.prompt[rows[np.unique(self.group[rows], return_index=True)[1]]].sum() for rows in parts)
        return bool(shared + self.own.sum() <= PAYS * (self.prompt + self.own).sum())

    @property
    def order(self) -> np.ndarray:
        """int64 [N]: each row's place when groups stand together, the shortest first, and rows of group -1 last."""
        place = np.empty(len(self.group), np.int64)
        place[self._sorted(1)] = np.arange(len(place))
        return place

    def under_budget(self, budget: int, unit: int) -> list[np.ndarray]:
        """Rows in micro-batches of at most `budget` tokens, rounded up to `unit`; the longest first.

        A group is cut, and its prompt computed again, only if it exceeds the budget by itself.
        ValueError when one row alone is over the budget.
        """
        room = budget // unit * unit - 1  # a sequence ends with a token of padding
        parts: list[list[int]] = []
        used, rows = 0, self._sorted(-1)
        for group in np.split(rows, np.flatnonzero(np.diff(self.group[rows])) + 1) if len(rows) else ():
            prompt, own = int(self.prompt[group[0]]), self.own[group].tolist()
            whole = prompt + sum(own)
            fresh = not parts or used + whole > room >= whole  # is a new micro-batch to begin?
            missing = prompt  # tokens of the prompt that the micro-batch still lacks
            for row, tokens in zip(group.tolist(), own, strict=True):
                if fresh or used + tokens + missing > room:
                    parts.append([])
                    used, missing, fresh = 0, prompt, False
                used += tokens + missing
                if used > room:
                    raise ValueError(f"a rollout of {used + 1} tokens exceeds the budget of {budget} of a micro-batch")
                parts[-1].append(row)
                missing = 0
        return [np.array(part, np.int64) for part in parts]

    def _sorted(self, sign: int) -> np.ndarray:
        longest = np.zeros(self.group.max(initial=-1) + 2, np.int64)  # the last one: of group -1
        np.maximum.at(longest, self.group, self.prompt + self.own)
        return np.lexsort((sign * self.own, self.group, sign * longest[self.group], self.group < 0))


def beginnings(tokens: np.ndarray, sampled: np.ndarray) -> Beginnings:
    """tokens int64 [N, T]; sampled bool [N, T]: those whose log-probabilities are wanted, none in the first column."""
    some, numbers = sampled.any(1), dict[bytes, int]()
    prompt = np.where(some, sampled.argmax(1), 0)
    last = np.where(some, sampled.shape[1] - 1 - sampled[:, ::-1].argmax(1), 0)
    group = [
        numbers.setdefault(row[:length].tobytes(), len(numbers)) if length else -1
        for row, length in zip(tokens, prompt, strict=True)
    ]
    return Beginnings(np.array(group, np.int64), prompt, last - prompt)


@dataclasses.dataclass(frozen=True)
class Family:
    """A prompt and the completions that follow it, in blocks of about the same length."""

    prompt: int  # tokens
    blocks: tuple[tuple[int, int], ...]  # completions, tokens of the longest of them: the others are padded

    @property
    def sizes(self) -> list[int]:
        """Tokens, padded, of the prompt and of each block."""
        return [self.prompt, *(n * length for n, length in self.blocks)]


@dataclasses.dataclass(kw_only=True)
class SharedPrompts(PackedSeqParams):
    """A micro-batch as one sequence of S tokens. megatron-core hands it to every layer's core attention.

    The last token is padding: nothing reads its states, so their gradients are 0. It stands for all padding below.
    """

    qkv_format: str = "sbhd"  # for megatron-core: the sequence is like any other
    tokens: Tensor  # int64 [1, S]
    positions: Tensor  # int64 [S], in their rollouts
    before: Tensor  # int64 [M]: where the token in front of each sampled one is, in the order of MicroBatch.sampled
    families: tuple[Family, ...]
    padded: Tensor  # int64 [sum of all sizes + 1]: which token stands there when families are put into padded rows
    packed: Tensor  # int64 [S]: where a token stands among those (padding: at the end)


def share(tokens: np.ndarray, sampled: np.ndarray, unit: int, device: torch.device) -> SharedPrompts:
    """Rows (as of `beginnings`) as one sequence whose length is a multiple of `unit`."""
    rows = beginnings(tokens, sampled)
    inputs, positions, families, padded = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [], []
    before = np.full(tokens.shape, -1)
    end = 0

    def append(row: int, start: int, n: int) -> np.ndarray:
        """The tokens of a row from `start` on; their places."""
        nonlocal end
        inputs.append(tokens[row, start : start + n])
        positions.append(np.arange(start, start + n))
        end += n
        return np.arange(end - n, end)

    for group in range(rows.group.max(initial=-1) + 1):
        members = np.flatnonzero(rows.group == group)
        members = members[np.argsort(-rows.own[members], kind="stable")]
        prompt, own = int(rows.prompt[members[0]]), rows.own[members]
        padded.append(append(members[0], 0, prompt))
        before[members, prompt] = end - 1
        blocks = []
        for start, stop in _alike(own):
            block = np.full((stop - start, own[start]), -1)
            for line, row in zip(block, members[start:stop], strict=True):
                n = int(rows.own[row])
                line[:n] = append(row, prompt, n)
                before[row, prompt + 1 : prompt + 1 + n] = line[:n]
            blocks.append(block.shape)
            padded.append(block.ravel())
        families.append(Family(prompt, tuple(blocks)))
    length = -(-(end + 1) // unit) * unit
    if not families:
        families, padded = [Family(1, ())], [np.array([-1])]
    source = np.concatenate([*padded, [-1]])
    place = np.full(length, len(source) - 1)
    place[source[source >= 0]] = np.flatnonzero(source >= 0)
    source[source < 0] = length - 1

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return SharedPrompts(
        max_seqlen_q=tokens.shape[1],
        max_seqlen_kv=tokens.shape[1],  # positions are below
        tokens=put(np.pad(np.concatenate(inputs), (0, length - end)))[None],
        positions=put(np.pad(np.concatenate(positions), (0, length - end))),
        before=put(before[sampled]),
        families=tuple(families),
        padded=put(source),
        packed=put(place),
    )


def _alike(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Descending lengths as ranges in which none is below half the longest; those of 0 are left out."""
    ranges, start, n = [], 0, int((lengths > 0).sum())
    while start < n:
        stop = int((2 * lengths[:n] >= lengths[start]).sum())
        ranges.append((start, stop))
        start = stop
    return ranges
