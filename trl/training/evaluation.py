"""Evaluate on items of any kind: every item counts once, however rows are batched and shared out over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from accelerate.utils import recursively_apply
from datasets import IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput

from trl.errors import ConfigError
from trl.training.collectives import gather_rows
from trl.training.evaluated_rows import ByRow, Filled, RowItems
from trl.training.metrics import Meter
from trl.training.parallel import unduplicated_rows
from trl.training.step_trainer import StepTrainer
from trl.training.window import dummy_batch, with_statistics
from trl.types import Metrics

EVAL = "get_eval_dataloader"


class EvaluatingTrainer(StepTrainer):
    """A `StepTrainer` that evaluates with the same losses. Subclasses define the same methods, and no others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meters["eval"] = Meter()
        self._counted = 0

    def prediction_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> tuple[None, None, None]:
        """Add a batch to the evaluation metrics; no predictions are stored or gathered."""
        counted, items = self.evaluated(inputs)
        self.evaluate_items(model, counted, self.statistics(counted), filling=items[:1])
        return None, None, None

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        """Keep the order of rows: micro-batches are planned by length anyway."""
        return SequentialSampler(eval_dataset)

    def evaluated(self, inputs: Any) -> tuple[list[Any], list[Any]]:
        """The items of an evaluation batch that count, and all of its items: see `trl.training.evaluated_rows`."""
        if isinstance(inputs, RowItems):
            rows, most = [self.items(row, source=EVAL) for row in inputs.rows], inputs.counted
        else:  # a batch of the user's own data loader
            rows = [[item] for item in self.items(inputs, source=EVAL)]
            most = len(rows)
        counted = list(chain(*rows[: unduplicated_rows(self.accelerator, most)]))
        self._counted = len(counted)
        return counted, list(chain(*rows))

    def gather_predictions(self, predictions: Any) -> Any:
        """Predictions or labels of all processes, `[N,…]`, in the order of the dataset; those of repeated rows are left out.

        Each process passes tensors (one, or several in a tuple) with a row for every item of its last evaluation batch.
        """
        return recursively_apply(lambda rows: gather_rows(rows[: self._counted], self.accelerator)[0], predictions)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        """As in `transformers`, but evaluation batches tell which of their rows count, and none is dropped."""
        given, drops = self.data_collator, self.args.dataloader_drop_last
        if not is_training:
            self.data_collator, self.args.dataloader_drop_last = ByRow(given), False
            if isinstance(dataset, IterableDataset) and self.accelerator.num_processes > 1:
                dataset = Filled(dataset, batch_size * self.accelerator.num_processes)
        try:
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = given, drops

    def evaluate_items(
        self, model: nn.Module, items: Sequence[Any], statistics: Mapping[str, Tensor], *, filling: Sequence[Any]
    ) -> None:
        """Add `items` to the evaluation metrics, with the same number of forward passes on every process.

        `filling` are items for dummy passes, which do not count, if another process has more micro-batches.
        """
        groups = [[items[i] for i in group] for group in self.plan(items, 1)]
        missing = self._most(len(groups)) - len(groups)
        for group in groups:
            self.evaluate_batch(model, group, statistics)
        for _ in range(missing):
            (batch,) = with_statistics([self.collate(filling)], statistics)
            with torch.no_grad(), self.compute_loss_context_manager():
                self.loss(model, self._prepare_inputs(dummy_batch(replace(batch, weight=batch.mask))))

    def evaluate_batch(self, model: nn.Module, items: Sequence[Any], statistics: Mapping[str, Tensor]) -> Metrics:
        """Add loss and metrics of `items`, a micro-batch of an evaluation batch with these `statistics`."""
        (batch,) = with_statistics([self.collate(items)], statistics)
        batch = self._prepare_inputs(batch)
        weights = self.weights(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            if getattr(self.compute_loss, "__func__", None) is StepTrainer.compute_loss:
                loss, metrics = self.loss(model, batch)
            else:
                loss, metrics = self._computed_loss(model, batch, weights)
                weights = weights.sum()
        self.meters["eval"].add_weighted("loss", loss, weights)
        self.meters["eval"].add(metrics, batch)
        return metrics

    def _computed_loss(self, model: nn.Module, batch: Any, weights: Tensor) -> tuple[Tensor, Metrics]:
        """The mean loss and metrics of a batch from a subclass's `compute_loss`, without adding them to training metrics."""
        processes = self.accelerator.num_processes
        batch = replace(batch, weight=weights / (weights.sum() * processes).clamp(min=torch.finfo(weights.dtype).tiny))
        mark, term = self.meters["train"].mark(), self.term
        self.term = None
        try:
            found = self.compute_loss(model, batch, return_outputs=True)
        finally:
            self.meters["train"].go_back(mark)
            self.term = term
        if isinstance(found, tuple):
            return found
        raise ConfigError(
            f"{type(self).__name__}.compute_loss was called with return_outputs=True, but returned a {type(found).__name__}: return "
            "the loss and the metrics, as super().compute_loss(model, inputs, return_outputs=True) does."
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `transformers`, but metrics are means over the whole dataset and not means of batch means, and training
        draws the same random numbers as without the evaluation, whose data loader draws some."""
        self.gather_function = self.gather_predictions  # `transformers` sets its own again when the loop ends
        with torch.random.fork_rng(devices=[]):  # loaders draw on the CPU
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        found = self._eval_metrics(metric_key_prefix)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _eval_metrics(self, prefix: str) -> dict[str, float]:
        """The metrics of the evaluation that has just ended, by name without its `prefix`. Subclasses add theirs."""
        return self.meters["eval"].read(self._gather, self.args.device)
