"""Log-probabilities from hidden states against a dense softmax: values, gradients, memory, collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dump.actor.logprobs import hidden_logprobs
from tests.distributed.launch import run_ranks

N, H, VOCABULARY, ROWS = 7, 5, 13, 16  # 16 rows of the weight, the last 3 of which are padding


def _inputs(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(ROWS, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (N,), generator=generator)
    coefficients = torch.randn(2, N, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, coefficients


def _dense(hidden, weight, targets, coefficients, temperature):
    """By torch.distributions; gradients of a weighted sum of log-probabilities and entropies."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    distribution = torch.distributions.Categorical(logits=hidden @ weight[:VOCABULARY].t() / temperature)
    logprobs, entropy = distribution.log_prob(targets), distribution.entropy()
    (coefficients[0] * logprobs + coefficients[1] * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def _ours(size, chunk, inputs, temperature, reduce=True):
    """On every rank: logprobs, entropy, gradient to hidden, gradient to its part of the weight."""
    hidden, weight, targets, coefficients = inputs

    def rank():
        r = dist.get_rank()
        own_hidden, own = hidden.clone().requires_grad_(), weight.chunk(size)[r].clone().requires_grad_()
        logprobs, entropy = hidden_logprobs(
            own_hidden, own, targets, dist.group.WORLD, r, VOCABULARY, temperature, chunk, reduce
        )
        (coefficients[0] * logprobs + coefficients[1] * entropy).sum().backward()
        return logprobs.detach(), entropy.detach(), own_hidden.grad, own.grad

    return run_ranks(rank, size)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("size", [1, 2, 8])  # 8: the last rank has nothing but padding
def test_values_and_gradients_equal_a_dense_softmax(size, chunk):
    inputs = _inputs()
    expected = _dense(*inputs, temperature=0.7)
    results = _ours(size, chunk, inputs, 0.7)
    for result in results:
        for ours, theirs in zip(result[:3], expected, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradient = torch.cat([r[3] for r in results])
    torch.testing.assert_close(gradient, expected[3], rtol=1e-12, atol=1e-12)
    assert not gradient[VOCABULARY:].any()


def test_without_the_reduction_the_ranks_parts_of_the_hidden_gradient_add_up():
    inputs = _inputs()
    parts = [result[2] for result in _ours(2, 3, inputs, 1.0, reduce=False)]
    torch.testing.assert_close(sum(parts), _dense(*inputs, 1.0)[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(parts[0], parts[1])


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_gradcheck(size, chunk):
    """Finite differences, in float64: every rank moves the same hidden states and its own rows of the weight."""
    hidden, weight, targets, _ = _inputs()

    def rank():
        r = dist.get_rank()
        own = weight.chunk(size)[r].clone().requires_grad_()

        def hidden_only(h):
            return hidden_logprobs(h, own.detach(), targets, dist.group.WORLD, r, VOCABULARY, 0.7, chunk)

        def weight_only(w):  # the other ranks' rows stand still while one rank moves its own
            return hidden_logprobs(hidden, w, targets, dist.group.WORLD, r, VOCABULARY, 0.7, chunk)

        ok = torch.autograd.gradcheck(hidden_only, hidden.clone().requires_grad_())
        if size == 1:
            ok &= torch.autograd.gradcheck(weight_only, own)
        return ok

    assert all(run_ranks(rank, size))


def test_logits_far_apart_stay_finite():
    """Probabilities that underflow to 0 add nothing to entropy and gradient, whichever rank has the peak."""
    inputs = _inputs(torch.float32, scale=300.0)
    dense = _dense(*(x.double() if x.is_floating_point() else x for x in inputs), temperature=1.0)
    for result in _ours(2, 3, inputs, 1.0):
        assert all(tensor.isfinite().all() for tensor in result)
        torch.testing.assert_close(result[0].double(), dense[0], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(result[1].double(), dense[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 3])
def test_bf16_inputs_are_reduced_in_fp32(chunk):
    """Against float64 on the same rounded inputs and the same rounded logits: only those two roundings remain."""
    hidden, weight, targets, coefficients = _inputs(torch.bfloat16)
    ((logprobs, entropy, d_hidden, d_weight),) = _ours(1, chunk, (hidden, weight, targets, coefficients.float()), 0.7)
    assert (logprobs.dtype, entropy.dtype, d_weight.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    logits = (hidden @ weight[:VOCABULARY].t()).double() / 0.7
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs.double(), distribution.log_prob(targets), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), distribution.entropy(), rtol=1e-6, atol=1e-6)
    dense = _dense(hidden.double(), weight.double(), targets, coefficients, 0.7)
    torch.testing.assert_close(d_hidden.double(), dense[2], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(d_weight.double(), dense[3], rtol=3e-2, atol=3e-2)


def test_the_weight_s_gradient_is_accumulated_in_fp32():
    """4096 chunks that each add 1: a bf16 sum would stop at 256."""
    n = 4096
    hidden, weight = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()

    def rank():
        logprobs, _ = hidden_logprobs(
            hidden, weight, torch.zeros(n, dtype=torch.int64), dist.group.WORLD, 0, 2, chunk_size=1
        )
        logprobs.sum().backward()
        return weight.grad.float()

    assert run_ranks(rank, 1)[0][:, 0].tolist() == [n / 2, -n / 2]


def test_the_entropy_alone_and_the_log_probabilities_alone_have_gradients():
    hidden, weight, targets, coefficients = _inputs()
    for kind in (0, 1):
        only = coefficients.clone()
        only[1 - kind] = 0
        expected = _dense(hidden, weight, targets, only, 1.0)

        def rank(kind=kind):
            own = hidden.clone().requires_grad_()
            outputs = hidden_logprobs(own, weight, targets, dist.group.WORLD, 0, VOCABULARY, chunk_size=3)
            (outputs[kind] * coefficients[kind]).sum().backward()
            return own.grad

        torch.testing.assert_close(run_ranks(rank, 1)[0], expected[2])


@pytest.mark.parametrize("size", [1, 2])
def test_no_tokens_have_no_log_probabilities_and_a_gradient_of_zero(size):
    inputs = _inputs()
    empty = (inputs[0][:0], inputs[1], inputs[2][:0], inputs[3][:, :0])
    for logprobs, entropy, d_hidden, d_weight in _ours(size, 3, empty, 1.0):
        assert logprobs.shape == entropy.shape == (0,) and d_hidden.shape == (0, H)
        assert d_weight.shape == (ROWS // size, H) and not d_weight.any()


class _Largest(TorchDispatchMode):
    """The most elements any tensor had that an operation returned, and how many matmuls there were."""

    numel = matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        self.matmuls += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
        return result


@pytest.mark.parametrize(("chunk", "largest", "matmuls"), [(8, 8 * 512, 8 * (1 + 1 + 2)), (None, 64 * 512, 1 + 2)])
def test_no_tensor_is_larger_than_a_chunk_s_logits(chunk, largest, matmuls):
    """64 tokens, 512 columns: in forward and backward. A single chunk is not computed again."""

    def rank():
        hidden, weight = torch.randn(64, 4).requires_grad_(), torch.randn(512, 4).requires_grad_()
        targets = torch.randint(0, 512, (64,))
        with _Largest() as seen:
            logprobs, entropy = hidden_logprobs(hidden, weight, targets, dist.group.WORLD, 0, 512, 1.0, chunk)
            (logprobs - entropy).sum().backward()
        return seen.numel, seen.matmuls

    assert run_ranks(rank, 1) == [(largest, matmuls)]


def test_one_collective_forward_and_one_backward_whatever_the_number_of_chunks(monkeypatch):
    inputs = _inputs()

    def rank():
        calls = []
        for name in ("all_gather", "all_reduce"):
            original = getattr(dist, name)
            monkeypatch.setattr(dist, name, lambda *a, _f=original, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
        hidden, weight, targets, _ = inputs
        own = weight.chunk(2)[dist.get_rank()].clone().requires_grad_()
        logprobs, _ = hidden_logprobs(
            hidden.clone().requires_grad_(), own, targets, dist.group.WORLD, dist.get_rank(), VOCABULARY, chunk_size=2
        )
        logprobs.sum().backward()
        return calls

    assert run_ranks(rank, 2) == [["all_gather", "all_reduce"]] * 2
