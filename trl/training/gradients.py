"""Check after the first backward pass that every trained parameter that was used has a gradient.

Quantised layers whose kernel has no backward pass, packed weights and detached outputs lose gradients silently: the layers
above learn, and those below never change. Modules that were not called (experts without tokens, an image encoder in a batch
of texts) are not checked, as they get no gradient.
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
"""Parts of the names of adapter parameters, all of which must get gradients."""


class GradientCheck:
    """Records by hooks which modules are called with gradients enabled, until `finish`."""

    def __init__(self, model: nn.Module) -> None:
        self._called: set[nn.Module] = set()
        owners = (m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False)))
        self._hooks = [module.register_forward_hook(self._record) for module in owners]

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._called.add(module)

    _record.only_watches = True  # lets fused layers ignore this hook: see `trl.models.kept_activations.is_plain`

    def finish(self, model: nn.Module) -> None:
        """Warn of parameters that were used but got no gradient. Raises ModelError if they belong to an adapter."""
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
                f"{said} A layer above them does not pass gradients on, for example a quantised layer whose kernel has no backward "
                "pass. Load the model in another precision, or with another quantisation."
            )
        logger.warning(said)
