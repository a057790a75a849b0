"""Replace parts of a model by fused Triton kernels while it decodes; which parts can be replaced is found by trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trl.models.fused import ROTATION, files_of, fits, norms_of, rotates_halves
from trl.models.patching import replaced_forwards
from trl.ops.products import exact_products
from trl.ops.triton_rotary import rotate
from trl.rollouts.fused import has_own_forward, norm_kind, norm_of
from trl.rollouts.fused_layers import layers_of, merged_products


class Fusions:
    """The parts of a model that fused kernels replace while it decodes.

    Merged weights are copied when this object is made: make a new one when the weights have changed.
    """

    @exact_products()
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.norms = norms_of(model, norm_kind, may_change=has_own_forward)
        self.files = files_that_rotate(model, device)
        self.layers = layers_of(model, dict(self.norms))
        self.products = merged_products(model)
        types = {parts.gate.weight.dtype for _, parts in self.layers}
        self.dtype = types.pop() if len(types) == 1 else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, fused kernels replace the parts found, for decode steps of one token per row."""
        rotations = [(file, getattr(file, ROTATION)) for file in self.files]
        for file, function in rotations:
            setattr(file, ROTATION, partial(self._rotate_one_token, function))
        try:
            with replaced_forwards(dict(self._forwards())):
                yield
        finally:
            for file, function in rotations:
                setattr(file, ROTATION, function)

    def _forwards(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        for module, kind in self.norms:
            yield module, partial(norm_of, module, kind=kind)
        for products in self.products:
            for number, linear in enumerate(products.linears):
                yield linear, partial(products.product, number)
        for layer, parts in self.layers:
            yield layer, parts.step
            yield parts.out, lambda x: x  # `step` does the output projection

    def _rotate_one_token(
        self,
        plain: Callable[..., tuple[Tensor, Tensor]],
        query: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        *rest: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """`rotate` for queries and keys `[B,heads,1,D]` whose every dimension is rotated, else the architecture's function.

        The results are rounded to the dtype of the weights, in which the cache stores keys and attention multiplies.
        """
        if rest or options or query.shape[2] != 1 or not fits(query, key, cos):
            return plain(query, key, cos, sin, *rest, **options)
        return rotate(query, key, cos, sin, dtype=self.dtype)


def files_that_rotate(model: nn.Module, device: torch.device) -> list[Any]:
    """Modeling files of `transformers` whose rotary embedding computes what `rotate` does."""
    files = files_of(model)
    return [file for file in files if hasattr(file, ROTATION) and rotates_halves(getattr(file, ROTATION), device)]
