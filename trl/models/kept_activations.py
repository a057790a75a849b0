"""Fewer activations saved for backward in decoder layers: no tensor twice, and none that is cheap to recompute.

    gated MLP       y = W_d (act(g) ⊙ u),  g = W_g x,  u = W_u x      Shazeer 2020 (arXiv:2002.05202), equation 6
                    PyTorch saves g, act(g), u and act(g) ⊙ u, the widest tensors of a layer; here g and u are saved
    projections     under autocast, each of W_q x, W_k x, W_v x (and W_g x, W_u x) saves its own cast of x; here they share one

At 0.5 billion parameters this saves two fifths of a layer's activations per token. It costs two more elementwise operations,
which a fused kernel hides (`trl.ops.triton_gate`), and saves some casts. Without that kernel, outputs and gradients are the
same to the bit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trl.models.fused import alike, gradients_of
from trl.models.patching import evaluating

logger = logging.getLogger(__name__)

NETWORK = ("gate_proj", "up_proj", "down_proj")
"""Names of W_g, W_u and W_d in decoders; their activation is `act_fn`."""
ATTENTION = ("q_proj", "k_proj", "v_proj")
"""Names of W_q, W_k and W_v, in the order in which they are called with x."""
KERNEL = "_trl_gate_kernel"
"""Attribute of a gated MLP: the name of its activation in `trl.ops.triton_gate`."""


def keep_less(model: nn.Module) -> tuple[int, int]:
    """Patch gated MLPs and attention projections of `model` to save fewer activations; return how many of each."""
    networks = [module for module in model.modules() if _is_gated(module) and _replaced(module)]
    attentions = [linears for module in model.modules() if (linears := _plain_projections(module))]
    for linears in attentions:
        for place, linear in enumerate(linears):
            linear.forward = MethodType(_query_projection if place == 0 else _next_projection, linear)
    return len(networks), len(attentions)


# ── gated MLPs ──────────────────────────────────────────────────────────────────────────────────────────────────


Activation = Callable[[Tensor], Tensor] | str
"""A function, or the name of an activation that the kernels of `trl.ops.triton_gate` have."""


class Gated(torch.autograd.Function):
    """act(g) ⊙ u `[…,F]`; or y `[…,H]` if the weight `[H,F]` and bias (`[H]` or None) of W_d are given."""

    @staticmethod
    def forward(
        ctx: Any, activation: Activation, gate: Tensor, up: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up, weight)
        product = gated_product(activation, gate, up)
        return product if weight is None else F.linear(product, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        learns_weight, learns_bias = ctx.needs_input_grad[3:]
        if weight is None:
            return None, *_gradients(ctx.activation, gate, up, grad, product=False)[:2], None, None
        flat = grad.flatten(0, -2)
        of_product = (flat @ weight.to(flat.dtype)).view_as(gate)
        of_gate, of_up, product = _gradients(ctx.activation, gate, up, of_product, product=learns_weight)
        of_weight = (product.flatten(0, -2).t() @ flat).t().to(weight.dtype) if learns_weight else None
        return None, of_gate, of_up, of_weight, flat.sum(0) if learns_bias else None


def gated_product(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """act(g) ⊙ u."""
    if isinstance(activation, str):
        from trl.ops.triton_gate import gated

        return gated(gate, up, activation)
    return activation(gate) * up


def _gradients(
    activation: Activation, gate: Tensor, up: Tensor, grad: Tensor, *, product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of g and u, given that of act(g) ⊙ u; with `product`, also the recomputed act(g) ⊙ u, else None."""
    if isinstance(activation, str):
        from trl.ops.triton_gate import gated_backward

        return gated_backward(gate, up, grad, activation, product=product)
    leaf = gate.detach().requires_grad_()
    with torch.enable_grad():
        active = activation(leaf)
    (of_gate,) = torch.autograd.grad(active, leaf, grad * up)
    active = active.detach()
    return of_gate, grad * active, active * up if product else None


def _gated_forward(self: nn.Module, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    both_plain = is_plain(self.gate_proj) and is_plain(self.up_proj)
    first, second = cast_once(x, 2) if both_plain else (x, x)
    gate, up, down = self.gate_proj(first), self.up_proj(second), self.down_proj
    activation = vars(self).get(KERNEL, self.act_fn) if _has_kernel(gate) else self.act_fn
    if is_plain(down) and "forward" in vars(down):
        return down(gate, up, activation)
    product = Gated.apply(activation, gate, up, None, None)
    if hasattr(down.forward, "takes_factors"):  # a fused adapter saves the factors and not their product
        return down(product, factors=(activation, gate, up))
    return down(product)


def _has_kernel(gate: Tensor) -> bool:
    return gate.is_cuda


def _down_projection(
    self: nn.Linear, x: Tensor, up: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """W_d x; or, given `up` and `activation`, W_d (act(x) ⊙ up)."""
    if up is None:
        return F.linear(x, self.weight, self.bias)
    return Gated.apply(activation, x, up, self.weight, self.bias)


def _is_gated(module: nn.Module) -> bool:
    """Whether the module has the submodules of a gated MLP, and an activation without weights."""
    activation = getattr(module, "act_fn", None)
    if "forward" in vars(module) or not callable(activation):
        return False
    learns = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    return not learns and all(isinstance(module._modules.get(name), nn.Module) for name in NETWORK)


def _replaced(module: nn.Module) -> bool:
    """Replace the forward of a gated MLP if outputs and gradients for random numbers stay the same; return whether."""
    weight, size = next(module.gate_proj.parameters(), None), getattr(module.gate_proj, "in_features", None)
    if weight is None or size is None:
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
    x = torch.randn(3, size, generator=generator, device=weight.device).to(dtype)
    with evaluating(module):
        try:
            expected = gradients_of(module, x)
        except (TypeError, ValueError, RuntimeError):  # its forward needs more than hidden states
            return False
        new = [(module, _gated_forward)]
        if is_plain(module.down_proj):
            new.append((module.down_proj, _down_projection))
        for part, forward in new:
            part.forward = MethodType(forward, part)
        if _has_kernel(x):
            _use_kernel(module, x, expected)
        if alike(gradients_of(module, x), expected):
            return True
    for part, _ in new:  # only what was set above: accelerate sets forwards on modules too
        del part.forward
    return False


def _use_kernel(module: nn.Module, x: Tensor, expected: Sequence[Tensor]) -> None:
    """Select the fused kernel of a gated MLP's activation, if there is one and its results are as expected."""
    from trl.ops.triton_gate import name_of

    if (name := name_of(module.act_fn)) is None:
        return
    setattr(module, KERNEL, name)
    try:
        same = alike(gradients_of(module, x), expected)
    except Exception as error:  # Triton's compiler raises errors of many classes
        logger.warning(f"The fused kernel for {name!r} activations failed, so PyTorch computes them: {error}")
        same = False
    if not same:
        delattr(module, KERNEL)


# ── linear layers that share an input ───────────────────────────────────────────────────────────────────────────


class CastOnce(torch.autograd.Function):
    """`count` views of one cast of x to `dtype`; their gradients are added in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype
        rounded = x.to(dtype)
        return tuple(rounded.view_as(rounded) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        found: Tensor | None = None
        for grad in reversed(grads):  # the order in which autograd adds them: the last linear layer comes first
            if grad is not None:
                found = grad.to(ctx.dtype) if found is None else found + grad
        return found, None, None


def cast_once(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """x for each of `count` linear layers: under autocast, views of one cast; else x itself."""
    device = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return (x,) * count
    return CastOnce.apply(x, torch.get_autocast_dtype(device), count)


class _SharedInput(threading.local):
    """The input of the attention that runs, and the views of its cast that are left for the next projections."""

    x: Tensor | None = None
    copies: tuple[Tensor, ...] = ()


_shared = _SharedInput()


def _query_projection(self: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        _shared.x, _shared.copies = x, cast_once(x, len(ATTENTION))
    return _next_projection(self, x)


def _next_projection(self: nn.Linear, x: Tensor) -> Tensor:
    if x is _shared.x:
        x, *others = _shared.copies
        _shared.x, _shared.copies = (_shared.x if others else None), tuple(others)
    return F.linear(x, self.weight, self.bias)


FORWARDS = (_gated_forward, _down_projection, _query_projection, _next_projection)
for _function in FORWARDS:
    # A bound method is pickled by its name, and read back as the class's own method of that name.
    _function.__name__ = "forward"


def is_plain(linear: object) -> bool:
    """Whether a module is an `nn.Linear` and no more: without adapter, quantised weight, or hooks other than those
    with a true `only_watches`."""
    if type(linear) is not nn.Linear or not all(getattr(hook, "only_watches", False) for hook in _hooks(linear)):
        return False
    own = vars(linear).get("forward")
    return own is None or getattr(own, "__func__", None) in FORWARDS


def _hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    return chain(module._forward_pre_hooks.values(), module._forward_hooks.values())


def _plain_projections(module: nn.Module) -> list[nn.Linear]:
    """The q, k and v projections of an attention module; empty if one of them is not plain."""
    linears = [module._modules.get(name) for name in ATTENTION]
    return linears if all(map(is_plain, linears)) else []
