"""Reads a named signal from a batch, with an error that says how to provide a missing one."""

from __future__ import annotations

from torch import Tensor

from trl.errors import DataError
from trl.types import Experience, Learnable

OF_REFERENCE = ("ref_logprobs", "full_kl")
"""Signals that come from scoring with the reference policy; others come from the rows of the dataset."""


def required(batch: Learnable | Experience, name: str, *, by: str) -> Tensor:
    """The signal `name`, `[N]` or `[N,C]`. Raises DataError if the batch lacks it; `by` is the loss or option that needs it."""
    if name not in batch.signals:
        remedy = "score the batch with the reference policy first" if name in OF_REFERENCE else "give every row one"
        raise DataError(f"{by} needs the signal {name!r}, and the batch has {sorted(batch.signals)}: {remedy}.")
    return batch.signals[name]
