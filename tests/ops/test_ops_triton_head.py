"""The head's kernels, on a GPU or in Triton's interpreter, and the torch path, both against autograd in float64."""

import itertools

import pytest
import torch

from trl.models.memory import tracing
from trl.ops import logprobs as ops
from trl.ops.logits import DIFFERENTIABLE, STATISTICS, LogitTransform
from trl.ops.logprobs import logprobs_from_linear, logprobs_from_logits

triton_head = pytest.importorskip("trl.ops.triton_head")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = frozenset(STATISTICS)
PLAIN = LogitTransform()
ROUNDING = 5e-4
"""Error of gradients whose factors are rounded to float16, which has 11 bits, with room for cutting off in place of rounding."""
BFLOAT16 = 4e-3
"""The same of bfloat16, which has 8."""


@pytest.fixture
def by_triton(monkeypatch):
    """The public function runs the kernels, on tiles of 8 tokens by 256 logits, in blocks of 128."""
    monkeypatch.setattr(ops, "_implementation", lambda device, dtype: triton_head.TritonLogprobs)
    monkeypatch.setattr(triton_head, "TILE_ROWS", 8)
    monkeypatch.setattr(triton_head, "TILE_ELEMENTS", 2048)
    monkeypatch.setattr(triton_head, "BLOCK", 128)


def problem(tokens, vocabulary, width=24, *, bias=False, dtype=torch.float32, seed=0):
    """Leaves whose logits have a standard deviation of 3, and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * (3 / width**0.5)
    offset = torch.randn(vocabulary, generator=generator) if bias else None
    target = torch.randint(0, vocabulary, (tokens,), generator=generator).to(DEVICE)
    return [None if x is None else x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight, offset)], target


def gradients(found, leaves):
    """Of a sum in which every token has a weight of its own, for each statistic that has gradients."""
    tokens = len(found["logprobs"])
    weights = torch.linspace(-1, 1, tokens + 1, dtype=torch.double, device=DEVICE)[1:]
    names = [name for name in DIFFERENTIABLE if name in found]
    total = sum(((i + 1) * weights * found[name]).sum() for i, name in enumerate(names))
    return torch.autograd.grad(total, [x for x in leaves if x is not None])


def in_float64(leaves, target, want, transform):
    """Statistics and gradients of the same numbers, by autograd."""
    exact = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    found = logprobs_from_logits(torch.nn.functional.linear(*exact), target, want=want, transform=transform)
    return found, gradients(found, exact)


def assert_near(found, exact, *, atol=1e-5, rtol=1e-5):
    assert found.keys() == exact.keys()
    for name, values in exact.items():
        assert torch.allclose(found[name].double(), values.double(), rtol=rtol, atol=atol), name


def distance(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("tokens", "bias", "transform"),
    [
        (1, False, PLAIN),
        (11, True, LogitTransform(temperature=0.3)),
        (2, True, LogitTransform(2.0, 5.0, 2.0)),
        (9, False, LogitTransform(0.25, 30.0, 0.7)),
    ],
    ids=str,
)
def test_all_statistics_equal_float64(by_triton, tokens, transform, bias):
    leaves, target = problem(tokens, 581, bias=bias)
    found = logprobs_from_linear(*leaves, target, want=EVERYTHING, transform=transform)
    exact, exact_gradients = in_float64(leaves, target, EVERYTHING, transform)
    assert_near(found, exact)
    for ours, theirs in zip(gradients(found, leaves), exact_gradients, strict=True):
        assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("want", [(), ("entropy",), ("mean_logprob",), ("collision", "greedy")], ids=str)
def test_statistics_one_by_one(by_triton, want):
    leaves, target = problem(3, 301)
    found = logprobs_from_linear(*leaves, target, want=frozenset(want))
    exact, exact_gradients = in_float64(leaves, target, frozenset(want), PLAIN)
    assert_near(found, exact)
    for ours, theirs in zip(gradients(found, leaves), exact_gradients, strict=True):
        assert distance(ours, theirs) < 1e-5


def test_some_hundreds_of_tokens(by_triton, monkeypatch):
    monkeypatch.setattr(triton_head, "TILE_ROWS", 128)
    monkeypatch.setattr(triton_head, "TILE_ELEMENTS", 128 * 256)
    leaves, target = problem(307, 101, width=8)
    found = logprobs_from_linear(*leaves, target, want=EVERYTHING)
    exact, exact_gradients = in_float64(leaves, target, EVERYTHING, PLAIN)
    assert_near(found, exact)
    for ours, theirs in zip(gradients(found, leaves), exact_gradients, strict=True):
        assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_factors_and_not_logits(request, kernels, dtype):
    """Logits that were rounded to bfloat16 would move log-probabilities by 1e-2."""
    if kernels:
        request.getfixturevalue("by_triton")
    leaves, target = problem(12, 300, width=64, bias=True, dtype=dtype)
    found = logprobs_from_linear(*leaves, target, want=EVERYTHING)
    exact, exact_gradients = in_float64(leaves, target, EVERYTHING, PLAIN)
    assert_near(found, exact)
    for ours, theirs in zip(gradients(found, leaves), exact_gradients, strict=True):
        assert ours.dtype == dtype
        unavoidable = distance(theirs.to(dtype), theirs)  # of the gradient, once it is summed
        of_factors = ROUNDING if kernels or dtype == torch.float16 else BFLOAT16
        assert distance(ours, theirs) < unavoidable + of_factors


@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
def test_gradients_under_autocast_are_float32(request, kernels):
    """Of float32 weights, whose gradients are not rounded after they are summed."""
    if kernels:
        request.getfixturevalue("by_triton")
    leaves, target = problem(12, 300, width=64)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = logprobs_from_linear(*leaves, target, want=EVERYTHING)
    rounded = [None if x is None else x.detach().bfloat16() for x in leaves]
    exact, exact_gradients = in_float64(rounded, target, EVERYTHING, PLAIN)
    assert_near(found, exact)
    for ours, theirs in zip(gradients(found, leaves), exact_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert distance(ours, theirs) < (ROUNDING if kernels else BFLOAT16 if DEVICE == "cuda" else 1e-5)


@pytest.mark.parametrize(
    ("weight_of_loss", "of_hidden", "of_weight"), [(1e-12, 1.0, 1.0), (1e6, 3e5, 1e-7), (1e-3, 1e-6, 1e4)], ids=str
)
def test_numbers_beyond_the_range_of_float16(by_triton, weight_of_loss, of_hidden, of_weight):
    """Factors of the gradient's products are scaled into it."""
    (hidden, weight, _), target = problem(12, 300, width=64)
    leaves = [(x.detach() * by).requires_grad_() for x, by in ((hidden, of_hidden), (weight, of_weight))]
    transform = LogitTransform(scale=1 / (of_hidden * of_weight), softcap=20.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = logprobs_from_linear(*leaves, None, target, want=EVERYTHING, transform=transform)
    rounded = [*(x.detach().bfloat16() for x in leaves), None]
    _, exact_gradients = in_float64(rounded, target, EVERYTHING, transform)
    weighted = {name: weight_of_loss * values for name, values in found.items()}
    for ours, theirs in zip(gradients(weighted, leaves), exact_gradients, strict=True):
        assert distance(ours / weight_of_loss, theirs) < ROUNDING


def test_a_gradient_that_is_not_finite_is_not_hidden(by_triton):
    (hidden, weight, _), target = problem(3, 300)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = logprobs_from_linear(hidden, weight, None, target)
    (gradient,) = torch.autograd.grad(found["logprobs"] @ found["logprobs"].new_tensor([1, torch.nan, 1]), hidden)
    assert not gradient[1].isfinite().any()


def test_torch_path_equals_float64_for_thousands_of_tokens():
    leaves, target = problem(5_000, 1013, width=16)
    found = logprobs_from_linear(*leaves, target, want=EVERYTHING)
    exact, exact_gradients = in_float64(leaves, target, EVERYTHING, PLAIN)
    assert_near(found, exact)
    for ours, theirs in zip(gradients(found, leaves), exact_gradients, strict=True):
        assert distance(ours, theirs) < 1e-3


def test_weights_of_a_peaked_distribution(by_triton):
    """Where a token is all but certain its probability is near 1, and what is left must not be lost in it."""
    leaves, target = problem(9, 300, width=64, dtype=torch.bfloat16)
    with torch.no_grad():
        leaves[0].copy_(3 * leaves[1][target])
    found = logprobs_from_linear(*leaves, target, want=frozenset({"entropy"}))
    exact, _ = in_float64(leaves, target, frozenset({"entropy"}), PLAIN)
    assert exact["logprobs"].max() > -1e-4
    assert_near(found, exact)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_numbers_that_are_not_finite_show(by_triton):
    leaves, target = problem(3, 300)
    with torch.no_grad():
        leaves[0][1, 0] = torch.nan
        leaves[0][2, 0] = torch.inf
    found = logprobs_from_linear(*leaves, target)["logprobs"]
    assert found.isnan().tolist() == [False, True, True]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_logits_of_minus_infinity_have_no_part_in_it(by_triton):
    """A vocabulary that is filled up to a round size, and banned by the bias."""
    leaves, target = problem(5, 300, bias=True)
    with torch.no_grad():
        leaves[2][200:] = -torch.inf
    found = logprobs_from_linear(*leaves, target % 200, want=frozenset({"entropy"}))
    short = [leaves[0], leaves[1][:200], leaves[2][:200]]
    exact, exact_gradients = in_float64(short, target % 200, frozenset({"entropy"}), PLAIN)
    assert_near(found, exact)
    ours = gradients(found, leaves)
    assert distance(ours[0], exact_gradients[0]) < 1e-5
    assert distance(ours[1][:200], exact_gradients[1]) < 1e-5
    assert not ours[1][200:].any()


def test_frozen_weights_and_frozen_states_get_no_gradient(by_triton):
    leaves, target = problem(5, 300)
    hidden, weight, _ = leaves
    logprobs_from_linear(hidden, weight.detach(), None, target)["logprobs"].sum().backward()
    kept, hidden.grad = hidden.grad, None
    assert weight.grad is None
    logprobs_from_linear(hidden.detach(), weight, None, target)["logprobs"].sum().backward()
    assert hidden.grad is None
    exact = in_float64(leaves, target, frozenset(), PLAIN)[0]["logprobs"]
    assert torch.isfinite(exact).all()
    assert kept.abs().sum() > 0
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_score_gives_nothing(by_triton, dtype):
    leaves, target = problem(0, 300, dtype=dtype)
    found = logprobs_from_linear(*leaves, target, want=EVERYTHING)
    assert found["entropy"].shape == (0,)
    hidden, weight = torch.autograd.grad(found["logprobs"].sum(), leaves[:2])
    assert hidden.shape == (0, 24)
    assert not weight.any()


def test_memory_beside_inputs_and_gradients_is_a_tile(monkeypatch):
    """On shapes alone: one tile of logits, in which their gradient takes its place, whatever M and V are."""
    monkeypatch.setattr(ops, "_implementation", lambda device, dtype: triton_head.TritonLogprobs)
    tokens, vocabulary, width = 24_000, 151_936, 64
    with tracing(vocabulary) as trace:
        hidden = torch.empty(tokens, width, requires_grad=True)
        weight = torch.empty(vocabulary, width, requires_grad=True)
        target = torch.empty(tokens, dtype=torch.long)
        found = logprobs_from_linear(hidden, weight, None, target, want=EVERYTHING)
        found["logprobs"].sum().backward()
    sizes = list(itertools.accumulate(event.size for event in trace.events))
    assert 0.9 < max(event.size for event in trace.events) / (4 * triton_head.TILE_ELEMENTS) <= 1
    assert max(sizes) < 4 * triton_head.TILE_ELEMENTS + 2 * 4 * width * (tokens + vocabulary) + 100 * tokens
