"""Norms and rotations of training in one kernel each, where an architecture's do what these do.

    norm       y = x / √(mean x² + ε) · (w + offset)            Zhang and Sennrich 2019, equation 4; offset 1 in Gemma
    rotation   `trl.ops.triton_rotary`

Small models are bound by how fast the host launches kernels. Written with PyTorch's operations, norms and rotations are more
than a third of what a step launches. An architecture's own code decides: its norm, and its function that rotates, are run
on random numbers next to these, backward too, and are replaced where the results are the same. Layers that `torch_compile`
compiles need none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

ROTATION = "apply_rotary_pos_emb"
"""What models of `transformers` call the function that rotates queries and keys, each in its own file."""

Rotation = Callable[..., tuple[Tensor, Tensor]]
Way = TypeVar("Way")


def fuse(model: nn.Module) -> tuple[int, int]:
    """Replace norms of `model`, and the rotations of its files, by single kernels; how many norms and files.

    A file's function rotates as before what is not on CUDA, or not of the usual shape.
    """
    rotating = [file for file in files_of(model) if fuse_rotation(file, next(model.parameters()).device)]
    found = norms_of(
        model,
        lambda module: next((norm for norm in NORMS if computes(module, norm)), None),
        may_change=lambda module: "forward" not in vars(module),
    )
    for module, norm in found:
        module.forward = MethodType(norm, module)
    return len(found), len(rotating)


def files_of(model: nn.Module) -> set[Any]:
    """The files in which the classes of `model` are written."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {sys.modules[type(module).__module__] for each in models for module in each.modules()}


@contextmanager
def for_the_moment(model: nn.Module) -> Iterator[None]:
    """Within it, `fuse` may replace rotations, which it does for all models of a file; afterwards they are as before.

    Without values every trial succeeds.
    """
    before = [(file, vars(file)[ROTATION]) for file in files_of(model) if ROTATION in vars(file)]
    try:
        yield
    finally:
        for file, function in before:
            setattr(file, ROTATION, function)


def fuse_as(model: nn.Module, policy: nn.Module) -> None:
    """Fuse a model that reads the policy's batches, where the policy is."""
    if any(map(is_fused, policy.modules())):
        fuse(model)


def is_fused(module: nn.Module) -> bool:
    """Whether the module's forward is one of this file's."""
    return getattr(vars(module).get("forward"), "__func__", None) in NORMS


# ── norms ───────────────────────────────────────────────────────────────────────────────────────────────────────


def rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """The norm of the last dimension, in the wider of the types of the input and of the weight."""
    weight = self._parameters["weight"]
    dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
    return F.rms_norm(hidden_states.to(dtype), weight.shape, weight.to(dtype), epsilon_of(self))


def offset_rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """With a weight that is added to one, in the type of the input."""
    weight = 1.0 + self._parameters["weight"].float()
    return F.rms_norm(hidden_states.float(), weight.shape, weight, epsilon_of(self)).type_as(hidden_states)


rms_norm.__name__ = offset_rms_norm.__name__ = "forward"  # a pickle names a method, and finds that of the class
NORMS = (rms_norm, offset_rms_norm)


def norms_of(
    model: nn.Module, way_of: Callable[[nn.Module], Way | None], *, may_change: Callable[[nn.Module], bool]
) -> list[tuple[nn.Module, Way]]:
    """Norms whose forward `may_change`, with the way to do without it; it is looked for once for each class."""
    ways: dict[type, Way | None] = {}
    found = []
    for module in model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or not may_change(module):
            continue
        if kind not in ways:
            ways[kind] = way_of(module)
        if (way := ways[kind]) is not None:
            found.append((module, way))
    return found


def epsilon_of(module: nn.Module) -> float | None:
    names = ("variance_epsilon", "eps", "epsilon")
    return next((vars(module)[name] for name in names if isinstance(vars(module).get(name), float)), None)


def computes(module: nn.Module, norm: Callable[[nn.Module, Tensor], Tensor], *, backward: bool = True) -> bool:
    """Whether the module's forward (and `backward`) is that of `norm`, by its results on random numbers."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or epsilon_of(module) is None:
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    results = gradients_of if backward else lambda function, x: [function(x)]
    return alike(results(partial(norm, module), x), results(module, x))


def gradients_of(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """The results of a function, and the gradients of the sum of their sines with respect to its inputs."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        found = function(*leaves)
        outputs = [found] if isinstance(found, Tensor) else [*found]
        gradients = torch.autograd.grad(sum(out.float().sin().sum() for out in outputs), leaves)
    return [x.detach() for x in (*outputs, *gradients)]


def alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are of the same types, and as close as these allow."""
    return all(a.dtype == b.dtype and close(a, b) for a, b in zip(found, expected, strict=True))


def close(found: Tensor, expected: Tensor, *, factors: torch.dtype | None = None) -> bool:
    """Whether results of one type are the same but for rounding, of products of `factors` or of that type."""
    rtol, atol = (1e-5, 1e-6) if (factors or expected.dtype) == torch.float32 else (2e-2, 1e-2)
    return torch.allclose(found.float(), expected.float(), rtol=rtol, atol=atol)


# ── rotations ───────────────────────────────────────────────────────────────────────────────────────────────────


def fuse_rotation(file: Any, device: torch.device) -> bool:
    """Let a file of `transformers` rotate by one kernel on CUDA, if it rotates halves; whether it does."""
    function = getattr(file, ROTATION, None)
    if function is None:
        return False
    if not hasattr(function, "_trl_plain") and rotates_halves(function, device):
        setattr(file, ROTATION, on_cuda(function))
    return hasattr(getattr(file, ROTATION), "_trl_plain")


def on_cuda(plain: Rotation) -> Rotation:
    """`plain`, with a kernel in its place for tensors on CUDA that are rotated whole."""
    from trl.ops.triton_rotary import Rotated

    @wraps(plain)
    def rotation(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if rest or options or not _has_kernel(query) or torch.compiler.is_compiling() or not fits(query, key, cos):
            return plain(query, key, cos, sin, *rest, **options)
        device = query.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return Rotated.apply(query, key, cos, sin, half)  # attention rounds to this type next

    rotation._trl_plain = plain
    return rotation


def _has_kernel(query: Tensor) -> bool:
    return query.is_cuda


def fits(query: Tensor, key: Tensor, cos: Tensor) -> bool:
    """Whether queries and keys `[B,heads,T,D]` are rotated whole by cos `[B or 1,T,D]`."""
    if not query.dim() == key.dim() == 4 or cos.dim() != 3:
        return False
    rows, _, length, size = query.shape
    return cos.shape[0] in (1, rows) and cos.shape[1:] == (length, size) and key.shape[-1] == size


def rotates_halves(function: Rotation, device: torch.device) -> bool:
    """Whether an architecture's function rotates queries and keys as `trl.ops.triton_rotary` does."""
    from trl.ops.triton_rotary import Rotated

    generator = torch.Generator(device).manual_seed(0)
    shapes = ((3, 4, 2, 16), (3, 2, 2, 16), (1, 2, 16), (1, 2, 16))
    query, key, cos, sin = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    try:
        expected = gradients_of(lambda q, k: function(q, k, cos, sin), query, key)
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, so it is another function
        return False
    found = gradients_of(lambda q, k: Rotated.apply(q, k, cos, sin, None), query, key)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
