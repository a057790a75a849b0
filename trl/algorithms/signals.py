"""The signals that an algorithm reads of a batch, and an error where one of them is missing."""

from __future__ import annotations

from torch import Tensor

from trl.errors import DataError
from trl.types import Experience, Learnable

OF_REFERENCE = ("ref_logprobs", "full_kl")
"""Signals that scoring with the reference policy gives; rows bring the others."""


def required(batch: Learnable | Experience, name: str, *, by: str) -> Tensor:
    """The signal `name`, `[N]` or `[N,C]`. Raises DataError where the batch has none; `by` names what asks for it."""
    if name not in batch.signals:
        remedy = "score the batch with the reference policy first" if name in OF_REFERENCE else "give every row one"
        raise DataError(f"{by} needs the signal {name!r}, and the batch has {sorted(batch.signals)}: {remedy}.")
    return batch.signals[name]
