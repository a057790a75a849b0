"""The load-balancing loss of a mixture of experts, as an extra term of each step's loss.

loss of a step = Σ weight · loss + c · L        L: see `trl.models.router_loss`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trl.errors import ConfigError
from trl.models.router_loss import OPTION, Load, RouterLoss, router_loss_of
from trl.training.metrics import Meter
from trl.training.window import LossTerm
from trl.types import Batch


@dataclass
class RouterTerm(LossTerm):
    """c · L over the tokens of a step on all processes; every micro-batch contributes its part.

    run                  runs the policy on a batch, in evaluation mode and without gradient
    sum_over_processes   sums a tensor `[K]` over the processes
    """

    router: RouterLoss
    run: Callable[[Batch], Any]
    sum_over_processes: Callable[[Tensor], Tensor]
    meter: Meter
    device: torch.device
    processes: int
    _load: Load | None = None
    """The expert load of the whole step, if it has several micro-batches or processes; else None."""

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Measure the expert load of a step of several micro-batches or processes, by an extra forward pass over it."""
        self._load = None
        if len(batches) == 1 and self.processes == 1:
            return
        parts = []
        for batch in (each.to(self.device) for each in batches):
            with self.router.recording(keeps_gradient=False) as logits:
                self.run(batch.masked_out())
            parts.append(self.router.load(logits, batch))
        local = torch.cat([sum(part.counts for part in parts), sum(part.weight for part in parts)[None]])
        whole = self.sum_over_processes(local).to(self.device)
        self._load = Load(whole[:-1], whole[-1])

    def recording(self) -> AbstractContextManager[list[Tensor]]:
        return self.router.recording()

    def loss(self, recorded: list[Tensor], batch: Batch) -> Tensor:
        if not recorded:
            raise ConfigError(
                f"{OPTION}={self.router.coefficient} does not work with reentrant gradient checkpointing: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        load = self.router.load(recorded, batch) if self._load is None else self._load
        part = self.router.loss(recorded, batch, load)
        share = len(recorded) * batch.copies.sum() * bool(batch.tokens) / load.weight.clamp(min=1)
        self.meter.count("aux_loss", part.detach(), per=share)
        return self.router.coefficient * part * self.processes


def router_loss(inner: PreTrainedModel, coefficient: float | None, *, is_sharded: bool) -> RouterLoss | None:
    """The load-balancing loss, if `coefficient` or the model's configuration enables it; else None.

    Raises ConfigError if it is enabled with FSDP, DeepSpeed or an encoder-decoder, where it is not available.
    """
    found = router_loss_of(inner, coefficient)
    if found is not None and (is_sharded or inner.config.is_encoder_decoder):
        what = "FSDP and DeepSpeed" if is_sharded else f"an encoder-decoder ({type(inner).__name__})"
        raise ConfigError(
            f"{OPTION}={found.coefficient} is not available with {what}: set it to 0, or "
            "output_router_logits=False in the model's configuration (model_init_kwargs)."
        )
    return found
