"""Attention over the cache of prompts and rows against attention over each sequence as a whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_dump.actor.kv_cache import KVCache

HEADS, KEY_HEADS, DIM, SCALE = 6, 2, 4, 0.3


@dataclasses.dataclass
class _Row:
    """Queries, keys and values of one completion, its prompt first: [T, heads, dim] each."""

    tokens: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def attend(self) -> torch.Tensor:
        """What its last token sees, [heads, dim]: torch's attention over the whole sequence."""
        q, k, v = (torch.stack(t).transpose(0, 1) for t in zip(*self.tokens, strict=True))
        k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 0) for t in (k, v))
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=SCALE)[0, :, -1]


def _token(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(heads, DIM, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS))


def _attend(cache: KVCache, tokens: list) -> torch.Tensor:
    """A pass of one layer: [N, heads, dim]."""
    q, k, v = (torch.stack(t)[:, None] for t in zip(*tokens, strict=True))
    return cache.attend(1, q, k, v, SCALE).view(-1, HEADS, DIM)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_history_of_groups_and_rows(seed):
    """Groups come, of any size and length, rows end, room is reused, grown and compacted."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    n_rows, n_own, longest = 7, 6, 5
    cache = KVCache(n_rows, n_own, longest, torch.device("cpu"))
    rows: dict[int, _Row] = {}
    for _ in range(60):
        sizes = [int(n) for n in rng.integers(1, 4, rng.integers(1, 4))]
        if cache.free >= sum(sizes) and (rng.random() < 0.4 or not rows):
            prompts = [[_token(generator) for _ in range(rng.integers(1, longest + 1))] for _ in sizes]
            found = cache.admit([len(p) for p in prompts], sizes)
            assert [len(f) for f in found] == sizes
            assert not set(np.concatenate(found).tolist()) & set(rows)
            cache.begin_prefill(cache.slots[[f[0] for f in found]])
            out = _attend(cache, [token for prompt in prompts for token in prompt])
            ends = np.cumsum([len(p) for p in prompts]) - 1
            for end, prompt, mine in zip(ends, prompts, found, strict=True):
                torch.testing.assert_close(out[end], _Row(prompt).attend())
                rows |= {int(row): _Row(list(prompt)) for row in mine}
            lengths = {int(row): len(rows[int(row)].tokens) for mine in found for row in mine}
            assert all(cache.prompts[cache.slots[row]] == length for row, length in lengths.items())
        elif rows:
            new = [_token(generator) for _ in range(len(cache.slots))]
            positions = cache.begin_decode()
            for row, state in rows.items():
                assert positions[row] == len(state.tokens)
                state.tokens.append(new[row])
            out = _attend(cache, new)
            for row, state in rows.items():
                torch.testing.assert_close(out[row], state.attend())
        done = [r for r in rows if cache.own[r] == n_own or rng.random() < 0.1]
        cache.release(np.array(done, np.int64))
        rows = {r: state for r, state in rows.items() if r not in done}
        if rows and rng.random() < 0.1:
            kept = cache.compact()
            assert set(kept.tolist()) == set(rows)
            rows = {new: rows[int(old)] for new, old in enumerate(kept)}
    assert torch.isfinite(out).all()


def test_a_prompt_is_kept_once_a_group():
    cache = KVCache(16, 8, 100, torch.device("cpu"))
    rows = cache.admit([100], [16])[0]
    cache.begin_prefill(cache.slots[rows[:1]])
    generator = torch.Generator().manual_seed(0)
    _attend(cache, [_token(generator) for _ in range(100)])
    numbers = (100 + 16 * 8) * KEY_HEADS * DIM * 2
    cache.begin_decode()
    assert cache.peak_bytes == 4 * numbers


def test_an_idle_pass_leaves_no_trace():
    cache, generator = KVCache(2, 4, 3, torch.device("cpu")), torch.Generator().manual_seed(0)
    rows = cache.admit([2], [2])[0]
    prompt = [_token(generator) for _ in range(2)]
    cache.begin_prefill(cache.slots[rows[:1]])
    _attend(cache, prompt)
    cache.begin_idle()
    assert torch.equal(_attend(cache, [_token(generator)]), torch.zeros(1, HEADS, DIM))
    cache.begin_decode()
    new = [_token(generator) for _ in range(2)]
    out = _attend(cache, new)
    for row in range(2):
        torch.testing.assert_close(out[row], _Row([*prompt, new[row]]).attend())
