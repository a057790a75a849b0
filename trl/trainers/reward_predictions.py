"""Rewards of rows, for `predict` and for metrics of a user's own: implicit ones of a policy, or those of a reward model.

pairs             predictions [P,2]: rewards of chosen and rejected          label_ids [P]: 0, the chosen one's place
single ones       predictions [N]                                            label_ids [N]: their label or score
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, TrainingArguments

from trl.errors import ConfigError
from trl.trainers.arguments import EvalRows, Rows, TrainerKeywords
from trl.trainers.base import BaseTrainer
from trl.types import Example, Metrics

ComputeMetrics = Callable[[EvalPrediction], dict[str, float]]


class PredictsRewards(BaseTrainer):
    """A trainer whose evaluation gives rewards to `compute_metrics`, and whose `predict` gives them, in one process."""

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows = None,
        processing_class: Any = None,
        *,
        compute_metrics: ComputeMetrics | None = None,
        **keywords: Unpack[TrainerKeywords],
    ) -> None:
        self._predicted: list[tuple[Example, Tensor, Tensor]] = []
        self._keeps_rewards = False
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **keywords)
        if compute_metrics is not None and self.accelerator.num_processes > 1:
            raise ConfigError("compute_metrics works in one process: evaluate apart from training, or leave it out.")
        self.compute_metrics = compute_metrics

    def predicted(self, metrics: Metrics, items: Sequence[Example]) -> tuple[Tensor, Tensor] | None:
        """Predictions and labels of the items of a batch, from its metrics; None where rows have no rewards."""
        chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
        if not chosen.isnan().any() and not rejected.isnan().any():
            return torch.stack([chosen, rejected], 1), torch.zeros_like(chosen)
        return torch.where(chosen.isnan(), rejected, chosen), (~chosen.isnan()).float()

    def evaluate_items(
        self,
        model: nn.Module,
        items: Sequence[Example],
        statistics: Mapping[str, Tensor],
        *,
        filling: Sequence[Example],
    ) -> None:
        """As ever; what is kept of the items' forward passes is put in the order of the items."""
        super().evaluate_items(model, items, statistics, filling=filling)
        places = {id(item): place for place, item in enumerate(items)}
        self._predicted.sort(key=lambda row: places[id(row[0])])

    def evaluate_batch(self, model: nn.Module, items: Sequence[Example], statistics: Mapping[str, Tensor]) -> Metrics:
        metrics = super().evaluate_batch(model, items, statistics)
        found = self.predicted(metrics, items) if self._keeps_rewards else None
        self._predicted += [] if found is None else zip(items, *found, strict=True)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool | None = None, *_: Any, **__: Any
    ) -> tuple[None, Tensor | None, Tensor | None]:
        self._predicted, self._keeps_rewards = [], not prediction_loss_only and self.accelerator.num_processes == 1
        super().prediction_step(model, inputs)
        if not self._predicted:
            return None, None, None
        _, predictions, labels = zip(*self._predicted, strict=True)
        return None, torch.stack(predictions), torch.stack(labels)
