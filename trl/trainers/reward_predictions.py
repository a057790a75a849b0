"""Metrics of a user's own, over the rewards that an evaluation gives: implicit ones of a policy, or those of a reward model.

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
    """A trainer whose evaluation gives rewards to `compute_metrics`."""

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
        self._predicted: list[tuple[Tensor, Tensor]] = []
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **keywords)
        if compute_metrics is not None and self.accelerator.num_processes > 1:
            raise ConfigError("compute_metrics works in one process: evaluate apart from training, or leave it out.")
        self.compute_metrics = compute_metrics

    def predicted(self, metrics: Metrics, items: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Predictions and labels of the items of a batch, from its metrics."""
        chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
        if not chosen.isnan().any() and not rejected.isnan().any():
            return torch.stack([chosen, rejected], 1), torch.zeros_like(chosen)
        return torch.where(chosen.isnan(), rejected, chosen), (~chosen.isnan()).float()

    def evaluate_batch(self, model: nn.Module, items: Sequence[Example], statistics: Mapping[str, Tensor]) -> Metrics:
        metrics = super().evaluate_batch(model, items, statistics)
        if self.compute_metrics is not None:
            self._predicted.append(self.predicted(metrics, items))
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool | None = None, *_: Any, **__: Any
    ) -> tuple[None, Tensor | None, Tensor | None]:
        self._predicted = []
        super().prediction_step(model, inputs)
        if not self._predicted or prediction_loss_only:
            return None, None, None
        predictions, labels = (torch.cat(parts) for parts in zip(*self._predicted, strict=True))
        return None, predictions, labels
