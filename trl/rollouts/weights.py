"""The weights of a policy as its forward multiplies them: cast once for a rollout batch of sampling, not once for every step.

Under autocast, float32 weights of linear layers are rounded to half precision in every forward. A step of decoding reads
each weight once, so that rounding costs more than the step. While sampling, linear layers hold the rounded weights
instead; the numbers are the same, and so is everything else that reads the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trl.rollouts.decoders import Policy


def autocast_dtype(policy: Policy) -> torch.dtype | None:
    """The type to which the policy's forward casts factors of products, or None; by a forward of one token."""
    found: list[torch.dtype] = []
    device = policy.device

    def look(*_: object) -> None:
        if torch.is_autocast_enabled(device.type):
            found.append(torch.get_autocast_dtype(device.type))

    handle = policy.inner.get_input_embeddings().register_forward_pre_hook(look)
    try:
        policy.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        handle.remove()
    return found[0] if found else None


@contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, linear layers in float32 hold their weights and biases in `dtype`. None changes nothing."""
    replaced: list[tuple[nn.Module, str, Tensor]] = []
    rounded: dict[int, Tensor] = {}
    for module in model.modules() if dtype is not None else ():
        for name in ("weight", "bias") if type(module) in (nn.Linear, Conv1D) else ():
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.dtype == torch.float32:
                replaced.append((module, name, parameter))
                if id(parameter) not in rounded:
                    rounded[id(parameter)] = parameter.detach().to(dtype)
    try:
        for module, name, parameter in replaced:
            module._parameters[name] = nn.Parameter(rounded[id(parameter)], requires_grad=False)
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
