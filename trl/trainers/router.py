"""The load-balancing loss of a mixture of experts as a part of what trainers of language models minimise.

loss of a step = Σ weight · loss + c · L        L: see `trl.models.router_loss`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trl.errors import ConfigError
from trl.models.patching import evaluating
from trl.models.router_loss import OPTION, Load, RouterLoss, router_loss_of
from trl.models.score import score
from trl.training.step_trainer import StepTrainer
from trl.types import Batch, Example


class WithRouterLoss(StepTrainer):
    """Adds the loss where `router_aux_loss_coef`, or the model's configuration, asks for it."""

    router: RouterLoss | None = None
    _load: Load | None = None
    """Of the step, where it has several micro-batches or processes; else it is that of its one pass."""

    def _router_loss(self, inner: PreTrainedModel) -> RouterLoss | None:
        found = router_loss_of(inner, self.args.router_aux_loss_coef)
        if found is not None and (self.is_sharded or inner.config.is_encoder_decoder):
            what = "FSDP and DeepSpeed" if self.is_sharded else f"an encoder-decoder ({type(inner).__name__})"
            raise ConfigError(
                f"{OPTION}={found.coefficient} is not available with {what}: set it to 0, or "
                "output_router_logits=False in the model's configuration (model_init_kwargs)."
            )
        return found

    def micro_batches(self, items: Sequence[Example], *, slots: int = 1) -> list[list[Batch]]:
        parts = super().micro_batches(items, slots=slots)
        batches = [batch for part in parts for batch in part]
        self._load = None
        if self.router is not None and (len(batches) > 1 or self.accelerator.num_processes > 1):
            self._load = self._measure_load(batches)
        return parts

    @torch.no_grad()
    def _measure_load(self, batches: Sequence[Batch]) -> Load:
        """How the tokens of a step are routed, by a pass over them."""
        parts = []
        for batch in (each.to(self.args.device) for each in batches):
            half, counted = self.compute_loss_context_manager(), self.router.recording(keeps_gradient=False)
            with half, evaluating(self.model), counted as logits:
                self._record_pass(self.model_wrapped, batch.masked_out())
            parts.append(self.router.load(logits, batch))
        local = torch.cat([sum(part.counts for part in parts), sum(part.weight for part in parts)[None]])
        whole = self._sum_over_processes(local).to(self.args.device)
        return Load(whole[:-1], whole[-1])

    def _record_pass(self, model: nn.Module, batch: Batch) -> None:
        """A forward pass, for what is recorded in it."""
        score(model, batch)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.router is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.router.recording() as logits:
            loss, metrics = super().compute_loss(model, inputs, return_outputs=True)
        if not logits:
            raise ConfigError(
                f"{OPTION}={self.router.coefficient} needs passes that keep their gradients: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        load = self.router.load(logits, inputs) if self._load is None else self._load
        part = self.router.loss(logits, inputs, load)
        share = float(len(logits) * inputs.copies.sum() / load.weight) if inputs.tokens else 0.0
        self.meters["train"].count("aux_loss", float(part.detach()), per=share)
        loss = loss + self.router.coefficient * part * self.accelerator.num_processes
        return (loss, metrics) if return_outputs else loss
