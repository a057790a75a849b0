"""RMS norms and rotary embeddings as one kernel each, in place of an architecture's own that compute the same.

    norm       y = x / √(mean x² + ε) · (w + offset)            Zhang and Sennrich 2019, equation 4; offset 1 in Gemma
    rotation   `trl.ops.triton_rotary`

Small models are bound by how fast the host launches kernels. Written with PyTorch's operations, norms and rotations are more
than a third of the launches of a step. Whether an architecture's norm or rotation can be replaced is tested, not listed: both
versions run on random numbers, forward and backward, and the results must agree. Layers compiled with `torch_compile` need none
of this, since the compiler fuses them.
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
"""Name of the function that rotates queries and keys; each modeling file of `transformers` has its own."""

Rotation = Callable[..., tuple[Tensor, Tensor]]
Replacement = TypeVar("Replacement")


def fuse(model: nn.Module) -> tuple[int, int]:
    """Replace the norms of `model`, and the rotations in its modeling files, by fused kernels; return how many of each.

    Tensors that are not on CUDA, or not of the usual shape, are still rotated by the file's own function.
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
    """The Python modules that define the classes of `model` and of its submodules."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {sys.modules[type(module).__module__] for each in models for module in each.modules()}


@contextmanager
def restoring_rotations(model: nn.Module) -> Iterator[None]:
    """Undo after the context what `fuse` did to rotations, which it replaces for all models of a file.

    For estimates on fake tensors: these have no values to compare, so that `fuse` takes every rotation for the same.
    """
    before = [(file, vars(file)[ROTATION]) for file in files_of(model) if ROTATION in vars(file)]
    try:
        yield
    finally:
        for file, function in before:
            setattr(file, ROTATION, function)


def fuse_as(model: nn.Module, policy: nn.Module) -> None:
    """Fuse the norms and rotations of `model`, which reads the policy's batches, if those of the policy are fused."""
    if any(map(is_fused, policy.modules())):
        fuse(model)


def is_fused(module: nn.Module) -> bool:
    """Whether the module's forward is one of this file's."""
    return getattr(vars(module).get("forward"), "__func__", None) in NORMS


# ── norms ───────────────────────────────────────────────────────────────────────────────────────────────────────


def rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """RMS norm over the last dimension, in the wider dtype of input and weight."""
    weight = self._parameters["weight"]
    dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
    return F.rms_norm(hidden_states.to(dtype), weight.shape, weight.to(dtype), epsilon_of(self))


def offset_rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """RMS norm that multiplies by 1 + weight, computed in float32 and returned in the dtype of the input."""
    weight = 1.0 + self._parameters["weight"].float()
    return F.rms_norm(hidden_states.float(), weight.shape, weight, epsilon_of(self)).type_as(hidden_states)


# A bound method is pickled by its name, and read back as the class's own method of that name.
rms_norm.__name__ = offset_rms_norm.__name__ = "forward"
NORMS = (rms_norm, offset_rms_norm)


def norms_of(
    model: nn.Module,
    replacement_of: Callable[[nn.Module], Replacement | None],
    *,
    may_change: Callable[[nn.Module], bool],
) -> list[tuple[nn.Module, Replacement]]:
    """RMS norms of `model` that `may_change`, each with the replacement that `replacement_of` finds, once per class."""
    replacements: dict[type, Replacement | None] = {}
    found = []
    for module in model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or not may_change(module):
            continue
        if kind not in replacements:
            replacements[kind] = replacement_of(module)
        if (replacement := replacements[kind]) is not None:
            found.append((module, replacement))
    return found


def epsilon_of(module: nn.Module) -> float | None:
    names = ("variance_epsilon", "eps", "epsilon")
    return next((vars(module)[name] for name in names if isinstance(vars(module).get(name), float)), None)


def computes(module: nn.Module, norm: Callable[[nn.Module, Tensor], Tensor], *, backward: bool = True) -> bool:
    """Whether the module and `norm` give the same outputs (and with `backward`, gradients) for random numbers."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or epsilon_of(module) is None:
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    results = gradients_of if backward else lambda function, x: [function(x)]
    return alike(results(partial(norm, module), x), results(module, x))


def gradients_of(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """The outputs of a function, and the gradients of Σ sin(output) with respect to its inputs."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        found = function(*leaves)
        outputs = [found] if isinstance(found, Tensor) else [*found]
        gradients = torch.autograd.grad(sum(out.float().sin().sum() for out in outputs), leaves)
    return [x.detach() for x in (*outputs, *gradients)]


def alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors have the same dtypes, and values that are `close`."""
    return all(a.dtype == b.dtype and close(a, b) for a, b in zip(found, expected, strict=True))


def close(found: Tensor, expected: Tensor, *, factors: torch.dtype | None = None) -> bool:
    """Whether two tensors are equal up to rounding errors in `factors`, by default the dtype of `expected`.

    `factors` is the dtype in which matrix products were computed, if that is not the dtype of the results.
    """
    rtol, atol = (1e-5, 1e-6) if (factors or expected.dtype) == torch.float32 else (2e-2, 1e-2)
    return torch.allclose(found.float(), expected.float(), rtol=rtol, atol=atol)


# ── rotations ───────────────────────────────────────────────────────────────────────────────────────────────────


def fuse_rotation(file: Any, device: torch.device) -> bool:
    """Make a modeling file of `transformers` rotate by one kernel on CUDA, if it rotates halves; return whether it does."""
    function = getattr(file, ROTATION, None)
    if function is None:
        return False
    if not hasattr(function, "_trl_plain") and rotates_halves(function, device):
        setattr(file, ROTATION, on_cuda(function))
    return hasattr(getattr(file, ROTATION), "_trl_plain")


def on_cuda(plain: Rotation) -> Rotation:
    """Wrap the rotation `plain`: tensors on CUDA whose whole head dimension is rotated go to the kernel."""
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
    """Whether cos `[B or 1,T,D]` rotates the whole head dimension D of queries and keys `[B,heads,T,D]`."""
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
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, so it computes something else
        return False
    found = gradients_of(lambda q, k: Rotated.apply(q, k, cos, sin, None), query, key)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
