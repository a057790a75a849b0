"""Rewards of evaluation rows for `predict` and `compute_metrics`: a policy's implicit rewards, or a reward model's.

pairs                 predictions [P,2]: rewards of chosen and rejected      label_ids [P]: 0, the index of the chosen one
single completions    predictions [N]: rewards                               label_ids [N]: label or score
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, TrainingArguments

from trl.trainers.arguments import EvalRows, Rows, TrainerKeywords
from trl.trainers.attributes import OfflineAttributes
from trl.trainers.base import BaseTrainer
from trl.training.collectives import all_gather_object
from trl.types import Example, Metrics

ComputeMetrics = Callable[[EvalPrediction], dict[str, float]]


class PredictsRewards(OfflineAttributes, BaseTrainer):
    """A trainer that passes the rewards of an evaluation to `compute_metrics`, and returns them from `predict`."""

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
        self.compute_metrics = compute_metrics

    def predicted(self, metrics: Metrics, items: Sequence[Example]) -> tuple[Tensor, Tensor] | None:
        """Predictions and labels of a batch's items, from its metrics; None if the rows have no rewards."""
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
        """Evaluate as `StepTrainer` does, then sort the rewards into the order of `items`, which micro-batches reorder."""
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
        self._predicted, self._keeps_rewards = [], not prediction_loss_only
        super().prediction_step(model, inputs)
        if prediction_loss_only:
            return None, None, None
        own = [(prediction.cpu(), label.cpu()) for _, prediction, label in self._predicted]
        found = list(chain(*all_gather_object(own, self.accelerator)))
        if not found:
            return None, None, None
        predictions, labels = zip(*found, strict=True)
        return None, torch.stack(predictions), torch.stack(labels)

    def gather_predictions(self, predictions: Any) -> Any:
        """Return `predictions`: `prediction_step` gathers them, since a process whose rows are all repeated has none to
        gather."""
        return predictions
