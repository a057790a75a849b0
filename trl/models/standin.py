"""A reference policy as a model, for what log-probabilities of given tokens do not answer: sampling, whole distributions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from trl.errors import ModelError
from trl.models.reference import AdapterOff, EarlierWeights, FrozenModel, Reference, evaluating


@contextmanager
def standing_in(reference: Reference, policy: nn.Module) -> Iterator[nn.Module]:
    """The model that behaves as the reference for the moment: its own, or `policy` changed back until the end."""
    match reference:
        case FrozenModel(model):
            yield model
        case AdapterOff():
            with evaluating(policy), extract_model_from_parallel(policy, keep_fp32_wrapper=True).disable_adapter():
                yield policy
        case EarlierWeights(weights):
            parameters = dict(extract_model_from_parallel(policy, keep_fp32_wrapper=True).named_parameters())
            trained = [parameters[name] for name in weights]
            now = [parameter.detach().clone() for parameter in trained]
            with torch.no_grad():
                torch._foreach_copy_(trained, list(weights.values()))
            try:
                with evaluating(policy):
                    yield policy
            finally:
                with torch.no_grad():
                    torch._foreach_copy_(trained, now)
        case _:
            raise ModelError(
                f"A {type(reference).__name__} reference is numbers, not a model: it cannot be sampled from."
            )
