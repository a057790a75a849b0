"""What tests of losses have in common."""

from __future__ import annotations

from typing import Any

import torch

from trl.types import Batch


def make_batch(mask: Any, **signals: Any) -> Batch:
    """A batch with nothing but what losses read: its mask `[N,C]`, and signals."""
    mask = torch.as_tensor(mask)
    nothing, none = torch.zeros(0, dtype=torch.long), torch.zeros(mask.shape, dtype=torch.long)
    found = {name: torch.as_tensor(value) for name, value in signals.items()}
    return Batch({}, none, none, none, mask, mask.flatten().nonzero().squeeze(-1), nothing, nothing, found)
