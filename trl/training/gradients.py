"""After the first backward pass, every parameter that is trained and took part has a gradient.

Kernels of quantised layers without a backward pass, packed weights and detached outputs lose gradients in silence: the
layers above learn, and those below stay as they are. A module that nothing has called (experts that no token went to, an
image encoder beside texts) has no gradient to get.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from trl.errors import ModelError, listed

logger = logging.getLogger(__name__)

SHOWN = 4
ADAPTERS = ("lora_", "trainable_tokens_delta", ".ia3_", ".oft_", ".vera_")
"""Parts of names of an adapter's parameters, all of which take part."""


class GradientCheck:
    """Watches which modules are called with gradient, until `finish`."""

    def __init__(self, model: nn.Module) -> None:
        self._called: set[nn.Module] = set()
        owners = (m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
        self._hooks = [module.register_forward_hook(self._record) for module in owners]

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._called.add(module)

    _record.only_watches = True  # so that layers compute as they do without it

    def finish(self, model: nn.Module) -> None:
        """Say which parameters were used and have no gradient. Raises ModelError where those of an adapter have none."""
        for hook in self._hooks:
            hook.remove()
        without = []
        for path, module in model.named_modules():
            if module in self._called:
                own = module.named_parameters(prefix=path, recurse=False)
                without += [name for name, p in own if p.requires_grad and p.grad is None]
        self._called.clear()
        if not without or all(p.grad is None for p in model.parameters()):
            return
        some = listed(without, SHOWN)
        said = f"{len(without)} trained parameters got no gradient in the first backward pass, so they would never change: {some}."
        if any(part in name for name in without for part in ADAPTERS):
            raise ModelError(
                f"{said} A layer above them passes none on: a quantised one whose kernel has no backward pass, for example. Load "
                "the model in another precision, or quantise it in another way."
            )
        logger.warning(said)
