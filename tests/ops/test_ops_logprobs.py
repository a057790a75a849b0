import gc
import math
import weakref

import pytest
import torch

from trl.ops import logprobs as ops
from trl.ops.logits import DIFFERENTIABLE, STATISTICS, LogitTransform
from trl.ops.logprobs import logprobs_from_linear, logprobs_from_logits, logprobs_from_module

EVERYTHING = frozenset(STATISTICS)


def test_numbers_worked_by_hand():
    # One hidden unit h = 1 and weights ln 1, ln 2, ln 5: p = (1/8, 2/8, 5/8).
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    found = logprobs_from_linear(torch.ones(2, 1), weight, None, torch.tensor([1, 2]), want=EVERYTHING)
    p = [1 / 8, 2 / 8, 5 / 8]
    assert found["logprobs"].tolist() == pytest.approx([math.log(2 / 8), math.log(5 / 8)])
    assert found["entropy"].tolist() == pytest.approx([-sum(q * math.log(q) for q in p)] * 2)
    assert found["mean_logprob"].tolist() == pytest.approx([sum(map(math.log, p)) / 3] * 2)
    assert found["mean_logit"].tolist() == pytest.approx([math.log(10) / 3] * 2)
    assert found["collision"].tolist() == pytest.approx([30 / 64] * 2)
    assert found["greedy"].tolist() == [0, 1]


def test_temperature_and_softcap_by_hand():
    # z = 2 tanh(3 · 1 / 2) / 0.5 against 0.
    transform = LogitTransform(scale=3.0, softcap=2.0, temperature=0.5)
    z = 2 * math.tanh(1.5) / 0.5
    found = logprobs_from_linear(
        torch.ones(1, 1), torch.tensor([[1.0], [0.0]]), None, torch.tensor([0]), transform=transform
    )
    assert found["logprobs"].item() == pytest.approx(-math.log1p(math.exp(-z)))


@pytest.mark.parametrize("kept", [0, 60, 2**26], ids=["recomputed", "some kept", "kept"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_autograd(monkeypatch, kept, softcap, bias):
    monkeypatch.setattr(ops, "KEPT_ELEMENTS", kept)
    monkeypatch.setitem(ops.CHUNK_ELEMENTS, "cpu", 40)
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double, requires_grad=True)

    hidden, weight, offset = rand(23, 7), rand(13, 7), rand(13) if bias else None
    target = torch.randint(0, 13, (23,), generator=generator)
    transform = LogitTransform(1.3, softcap, 0.7)
    leaves = [x for x in (hidden, weight, offset) if x is not None]

    def run(found):
        mix = sum((found[name] * torch.arange(23)).sum() for name in DIFFERENTIABLE)
        return found, torch.autograd.grad(mix, leaves)

    chunked, chunked_gradients = run(
        logprobs_from_linear(hidden, weight, offset, target, want=EVERYTHING, transform=transform)
    )
    logits = torch.nn.functional.linear(hidden, weight, offset)
    plain, plain_gradients = run(logprobs_from_logits(logits, target, want=EVERYTHING, transform=transform))
    module, module_gradients = run(
        logprobs_from_module(
            lambda h: torch.nn.functional.linear(h, weight, offset),
            hidden,
            target,
            vocabulary=13,
            want=EVERYTHING,
            transform=transform,
        )
    )
    for name in plain:
        torch.testing.assert_close(chunked[name], plain[name])
        torch.testing.assert_close(module[name], plain[name])
    for a, b, c in zip(chunked_gradients, module_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_no_gradient_is_computed_for_a_frozen_head():
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    logprobs_from_linear(hidden, weight, None, torch.tensor([0, 1, 2]))["logprobs"].sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None


def test_nothing_to_score_gives_nothing():
    found = logprobs_from_linear(torch.zeros(0, 4), torch.randn(5, 4), None, torch.zeros(0, dtype=torch.long))
    assert found["logprobs"].shape == (0,)


def test_probabilities_are_freed_with_the_graph():
    """Without waiting for Python's collector of cycles."""
    gc.collect()
    gc.disable()
    try:
        hidden = torch.randn(8, 4, requires_grad=True)
        found = logprobs_from_linear(hidden, torch.randn(11, 4), None, torch.arange(8), want=EVERYTHING)
        node = weakref.ref(found["logprobs"].grad_fn)
        found["logprobs"].sum().backward()
        del found
        assert node() is None
    finally:
        gc.enable()


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_tokens_times_vocabulary_never_exists():
    tokens, vocabulary, width = 4096, 128_000, 2
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    target = torch.randint(0, vocabulary, (tokens,))
    with _Largest() as seen:
        found = logprobs_from_linear(hidden, weight, None, target, want=frozenset({"entropy", "greedy"}))
        found["logprobs"].sum().backward()
    assert seen.largest <= ops.CHUNK_ELEMENTS["cpu"] < tokens * vocabulary / 50
