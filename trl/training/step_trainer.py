"""Run optimizer steps: the items of a step (its window) are split into micro-batches, whose loss weights sum to 1.

    items of a window ──plan──▶ micro-batches ──collate──▶ batches ──normalize weights──▶ Σ weight · loss ──▶ one step

An item can be anything: a text, a pair of answers, a denoising trajectory. A subclass defines it by these methods:

    size(item)                cost of an item in a forward pass, in tokens or denoising steps
    collate(items)            items as one batch: a `StepBatch` of `trl.types`
    loss(model, batch)        the losses of a batch, in the shape of its weights, and metrics
    weights(batch)            weights of the losses before normalisation
    describe(items)           descriptions of items for error messages

`transformers.Trainer` runs the loop over epochs; `get_batch_samples` gives it the micro-batches of a window. A custom loop calls
`optimizer_step(items)`, with the same micro-batches, and the same skipping and counting of steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from trl.compat.advice import SWEEP
from trl.errors import ConfigError
from trl.ops.reduce import WEIGHTS
from trl.training.collectives import all_gather_object
from trl.training.gradients import GradientCheck
from trl.training.metrics import LossMetrics, Meter
from trl.training.nonfinite import (
    NonFiniteError,
    SkippedSteps,
    Window,
    is_finite,
    items_with_bad_gradients,
    items_with_bad_losses,
    nonfinite_error,
    propagate_nonfinite,
)
from trl.training.optimizers import check_unscaled
from trl.training.parallel import (
    accumulating,
    backward,
    check_parallelism,
    explain_waits,
    use_one_device,
)
from trl.training.resumable import ResumableTrainer
from trl.training.window import (
    LossTerm,
    NextWindow,
    dummy_batch,
    normalize_weights,
    plan_micro_batches,
    split_into_slots,
    with_statistics,
)
from trl.types import Metrics

logger = logging.getLogger(__name__)

DECIDE_ALIKE = ("transformers", "trl", "trlx")
"""Packages whose callbacks make the same decisions on all processes."""
DECISIONS = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")
"""What callbacks decide, as attributes of `TrainerControl`."""


class StepTrainer(ResumableTrainer):
    """Runs optimizer steps on items of any kind. Subclasses define the methods at the top of the file."""

    lays_out_ahead: bool = False
    """Whether the next window is planned and collated while the device works on the present one. Only possible if its rows do not
    depend on the step in between, and collating draws no random numbers."""
    term: LossTerm | None = None
    """A loss of the whole step that is added to the losses of items."""
    averaging: str = "token"
    """How losses are averaged: a name in `trl.ops.reduce.WEIGHTS`."""
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keep_precision()
        check_parallelism(self.args, self.accelerator)
        use_one_device(self.args)
        self.model_accepts_loss_kwargs = True
        self.meters = {"train": Meter()}
        self.steps = SkippedSteps()
        self._has_checked_gradients = self._agrees = False
        self.states.register("metrics", self.meters["train"], per_rank=True, optional=True)
        self.states.register("steps", self.steps, optional=True)
        self._source: tuple[Iterator[Any], int] | None = None
        self._next: NextWindow | None = None
        self._tr_loss = torch.zeros((), device=self.args.device)
        self._window = Window((), (), self._tr_loss.clone(), self.meters["train"].mark())
        self._throughput, self._timed_steps = (0, 0.0), 0
        self._window_started: float | None = None

    def _keep_precision(self) -> None:
        """Ignore options by which an evaluation would round the weights that are trained."""
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self.args, name) and self.train_dataset is not None:
                setattr(self.args, name, False)
                logger.warning(
                    f"{name}=True has no effect: it would round the trained weights. Evaluations compute as training does."
                )

    # ---- methods for subclasses ----

    def items(self, rows: Any, *, source: str) -> list[Any]:
        """Convert a batch of a data loader to items; `source` names the loader in errors."""
        return list(rows)

    def size(self, item: Any) -> int:
        """Cost of an item in a forward pass: tokens, or denoising steps."""
        raise NotImplementedError

    def collate(self, items: Sequence[Any]) -> Any:
        """The items as one batch, on the host."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """Losses of `batch`, in the shape of `weights(batch)`, and metrics."""
        raise NotImplementedError

    def weights(self, batch: Any) -> Tensor:
        """Unnormalised weights of the losses of a batch."""
        return WEIGHTS[self.averaging](batch.mask)

    def statistics(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Statistics of a whole window over all processes that its losses need as signals: `{name: scalar}`.

        Called once per window, before training on it, and once per evaluation batch, of which a process may have no items.
        """
        return {}

    def micro_batch_budget(self) -> int | None:
        """Maximal size of a micro-batch, in the unit of `size`. None: no more micro-batches than accumulation steps."""
        return None

    def describe(self, items: Sequence[Any]) -> list[str]:
        """A short description of each item."""
        return [f"an item of size {self.size(item)}" for item in items]

    # ---- the window ----

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Keep all columns: `items` reads them."""
        return dataset

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        return data_collator

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[list[Any]], int]:
        """The micro-batches of one optimizer step, with weights: a list of them per accumulation step of `transformers`."""
        if self.is_finished():
            return [], 1
        self._window_started = time.perf_counter()
        self._source = epoch_iterator, num_batches
        if self._next is not None and self._next.source is epoch_iterator:
            items, slots = self._next.items, self._next.slots
        else:
            items, slots = self._pull(epoch_iterator, num_batches)
        self.restore_rng_state()
        return (self.micro_batches(items, slots=slots) if items else []), 1

    def _pull(self, iterator: Iterator[Any], count: int) -> tuple[list[Any], int]:
        """The items of the next `count` batches of a loader, and how many batches it still had."""
        parts = [
            self.items(rows, source="get_train_dataloader") for _, rows in zip(range(count), iterator, strict=False)
        ]
        return [item for part in parts for item in part], len(parts)

    def _lay_out_next(self) -> None:
        """Plan and collate the next window of this epoch while the device is still busy with this one."""
        if not self.lays_out_ahead or self._source is None:
            return
        items, slots = self._pull(*self._source)
        if items:
            self._next = NextWindow(self._source[0], items, slots, *self._laid_out(items, slots))

    def _laid_out(self, items: Sequence[Any], slots: int) -> tuple[list[list[int]], list[Any]]:
        """The indices of items in each micro-batch, and the collated micro-batches."""
        following, self._next = self._next, None
        if following is not None and following.items is items:
            return following.groups, following.batches
        groups = self.plan(items, slots)
        return groups, [self.collate([items[i] for i in group]) for group in groups]

    def micro_batches(self, items: Sequence[Any], *, slots: int = 1) -> list[list[Any]]:
        """The micro-batches of a window, with normalised weights, for each of `slots` accumulation steps.

        Dummy batches are added so that all processes have the same number.
        """
        groups, batches = self._laid_out(items, slots)
        batches = with_statistics(batches, self.statistics(items))
        batches, tokens = normalize_weights(batches, self.weights, self._sum_over_processes)
        self.state.num_input_tokens_seen += tokens
        self._throughput = (self._throughput[0] + tokens, self._throughput[1])
        batches += [dummy_batch(batches[-1])] * (self._most(len(batches)) - len(batches))
        parts = [[items[i] for i in group] for group in groups]
        self._window = Window(parts, batches, self._tr_loss.clone(), self.meters["train"].mark())
        if self.term is not None:
            self.term.begin_step(batches)
        return split_into_slots(batches, slots)

    @property
    def largest_pass(self) -> int:
        """Number of positions in the largest micro-batch of this step; 0 before the first step."""
        return max((batch.positions for batch in self._window.batches), default=0)

    def plan(self, items: Sequence[Any], count: int) -> list[list[int]]:
        """Split items into at least `count` micro-batches; return the indices in each."""
        sizes = [self.size(item) for item in items]
        return plan_micro_batches(sizes, count=count, token_budget=self.micro_batch_budget())

    # ---- the step ----

    def training_step(self, model: nn.Module, inputs: list[Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of the micro-batches of one accumulation step."""
        plain = super().training_step
        return self._accumulate(model, inputs, lambda batch: plain(model, batch, num_items_in_batch))

    def optimizer_step(self, items: Sequence[Any], *, count: int = 1) -> None:
        """Take one optimizer step on `items`, in at least `count` micro-batches, outside of `train`.

        The model keeps its mode (training or evaluation).

        Raises NonFiniteError after max_skipped_steps non-finite steps in a row.
        """
        model = self.model_wrapped
        batches = [batch for slot in self.micro_batches(items, slots=count) for batch in slot]
        self._accumulate(model, batches, partial(self._backward, model))
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or inf)
        if self.accept_step(model, norm) or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _accumulate(self, model: nn.Module, batches: Sequence[Any], run: Callable[[Any], Tensor]) -> Tensor:
        """Call `run` on all batches and sum the losses; gradients are reduced over processes with the last batch."""
        check = self._gradient_check()
        *before, last = batches
        loss = torch.zeros((), device=self.args.device)
        for batch in before:
            with accumulating(self.accelerator, model):
                loss += run(batch)
        loss = loss + run(last)
        if check is not None:
            check.finish(self.model)
        return loss

    def _gradient_check(self) -> GradientCheck | None:
        """A check of the first backward pass; None later, and if parameters are sharded, or `torch_compile` would
        compile hooks."""
        if self._has_checked_gradients or self.is_sharded or self.args.torch_compile:
            return None
        self._has_checked_gradients = True
        return GradientCheck(self.model)

    def _backward(self, model: nn.Module, batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        backward(self.accelerator, loss)
        return loss.detach()

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Metrics]:
        """Σ weight · loss, times the number of processes, since gradients are averaged over them. With `return_outputs`, also
        the metrics."""
        with nullcontext() if self.term is None else self.term.recording() as recorded:
            loss, metrics = self.loss(model, inputs)
        self._check_shape(loss, inputs.weight)
        if inputs.tokens:
            self.meters["train"].add(metrics, inputs)
            self.meters["train"].count("padding_share", inputs.positions - inputs.tokens, per=inputs.positions)
        total = propagate_nonfinite((loss * inputs.weight).sum() * self.accelerator.num_processes)
        if self.term is not None:
            total = total + self.term.loss(recorded, inputs)
        return (total, LossMetrics(metrics)) if return_outputs else total

    def _check_shape(self, loss: Tensor, weight: Tensor) -> None:
        """Raises ConfigError for a loss that is already reduced, or whose shape would broadcast with the weights."""
        if loss.shape != weight.shape:
            raise ConfigError(
                f"{type(self).__name__}.loss returned a loss of shape {list(loss.shape)}, but the weights of its batch have the shape "
                f"{list(weight.shape)}: return one loss for each weight, not averaged; the weights of a step sum to 1."
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.scaler is not None:
            check_unscaled(self.model)
        self._agrees = self.accelerator.num_processes > 1 and self._has_own_callbacks()
        with explain_waits(self.args, lambda: self.state.global_step):  # a function, as the loop replaces the state
            output = super()._inner_training_loop(*args, **kwargs)
        if self._took_no_step():
            raise self.nonfinite_error()
        return output

    # ---- steps that are not finite ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm for the log; None if the step is skipped because it is not finite: see `trl.training.nonfinite`."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._lay_out_next()
        return norm if self.accept_step(model, norm) else None

    def accept_step(self, model: nn.Module, norm: Tensor | float | None) -> bool:
        """Count the step; drop its gradients if their norm is not finite, so that the optimizer changes nothing.

        Raises NonFiniteError after max_skipped_steps skipped steps in a row.
        """
        finite = is_finite(norm)
        self.steps.add(skipped=not finite)
        if finite:
            return True
        self.rollback_metrics()
        if self._skipped_too_many():
            raise self.nonfinite_error()
        # The gradient scaler of float16 skips the step itself, and lowers its scale.
        if self.accelerator.scaler is None:
            model.zero_grad(set_to_none=True)
        return False

    def rollback_metrics(self) -> None:
        """Restore metrics and loss to their values before this step."""
        self.meters["train"].go_back(self._window.mark)
        self._tr_loss.copy_(self._window.loss)

    def _skipped_too_many(self) -> bool:
        if self.is_deepspeed_enabled and not self.args.fp16:  # DeepSpeed has already taken the step
            return True
        scaler, most = self.accelerator.scaler, self.args.max_skipped_steps
        still_looking = scaler is not None and scaler.get_scale() > 1
        return most is not None and self.steps.in_a_row >= most and not still_looking

    def _took_no_step(self) -> bool:
        """Whether all steps of a finished run were skipped, although they were fewer than max_skipped_steps."""
        may_go_on = self.args.max_skipped_steps is None or self.accelerator.scaler is not None
        return not may_go_on and 0 < self.state.global_step == self.steps.skipped

    def nonfinite_error(self) -> NonFiniteError:
        """The error that ends a run, with the items of all processes that caused it. All processes must call it."""
        bad, what = items_with_bad_losses(self._window, self._losses_now), "loss"
        if not any(all_gather_object(bool(bad), self.accelerator)):
            trained = [] if self.is_sharded else [p for p in self.model.parameters() if p.requires_grad]
            bad, what = items_with_bad_gradients(self._window, self._loss_alone, trained), "gradient"
        rows = [row for part in all_gather_object(self.describe(bad), self.accelerator) for row in part]
        step, limit = self.state.global_step + 1, self.args.max_skipped_steps
        weights = self.nonfinite_weights()
        return nonfinite_error(rows, what, in_a_row=self.steps.in_a_row, step=step, limit=limit, weights=weights)

    def _losses_now(self, batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            return self.loss(self.model_wrapped, batch.to(self.args.device))[0].cpu()

    def _loss_alone(self, item: Any, batch: Any) -> Tensor:
        """The loss of a single item of a window, with the statistics of the window from its `batch`."""
        alone = self.collate([item])
        statistics = {k: v[:1].expand(len(alone.mask)) for k, v in batch.signals.items() if k not in alone.signals}
        alone = replace(alone, signals={**alone.signals, **statistics}).to(self.args.device)
        with self.compute_loss_context_manager():
            loss, _ = self.loss(self.model, alone)
        return (loss * self.weights(alone)).sum()

    # ---- what is reported ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**self.steps.corrected(logs), **self._train_metrics()}
        if "train_loss" in logs and self.steps_since_log:
            logs = {**self._train_metrics(), **logs}
        if "train_loss" in logs and self.steps.skipped:
            logs["train_loss"] = self.steps.corrected_mean(logs["train_loss"], self.state.global_step)
            logs["skipped_steps"] = self.steps.skipped
        super().log(logs, start_time)

    def _train_metrics(self) -> dict[str, float]:
        """Metrics since the last log, and tokens per second of training (without evaluation and saving) over all processes."""
        metrics = self.meters["train"].read(self._gather, self.args.device)
        tokens, seconds = self._throughput
        steps, self._throughput, self._timed_steps = self._timed_steps, (0, 0.0), 0
        speed = {"tokens_per_second": tokens / seconds, "step_time": seconds / steps} if steps else {}
        return {**metrics, "num_tokens": self.state.num_input_tokens_seen, **speed}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._window_started is not None:
            spent = time.perf_counter() - self._window_started
            self._throughput = (self._throughput[0], self._throughput[1] + spent)
            self._timed_steps += 1
            self._window_started = None
        self._agree()
        is_last = self.state.global_step == self.state.max_steps
        # Without this, the loss of steps after the last multiple of logging_steps would be in no log.
        self.control.should_log |= is_last and self.args.logging_strategy == IntervalStrategy.STEPS
        acts = any(getattr(self.control, name) for name in ("should_log", "should_evaluate", "should_save"))
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if acts:
            self._agree()

    def _track_num_input_tokens(self, inputs: list[Any]) -> None:
        """Do nothing: `micro_batches` counts tokens."""

    # ---- methods of transformers that are not supported ----

    def hyperparameter_search(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(f"{type(self).__name__}.hyperparameter_search is not available. {SWEEP}")

    def call_model_init(self, trial: Any = None) -> NoReturn:
        raise ConfigError(f"{type(self).__name__}.model_init would replace the model that was prepared. {SWEEP}")

    # ---- over processes ----

    def _has_own_callbacks(self) -> bool:
        """Whether any process has a callback that might decide otherwise than those of other processes."""
        own = any(type(each).__module__.split(".")[0] not in DECIDE_ALIKE for each in self.callback_handler.callbacks)
        return any(all_gather_object(own, self.accelerator))

    def _agree(self) -> None:
        """Make a decision of a callback on one process, such as to stop, that of all processes."""
        if not self._agrees:
            return
        own = torch.tensor([[getattr(self.control, name) for name in DECISIONS]], dtype=torch.int)
        for name, anywhere in zip(DECISIONS, self._gather(own).any(0).tolist(), strict=True):
            setattr(self.control, name, anywhere)

    def _most(self, count: int) -> int:
        """The maximum of `count` over processes: all have to do the same number of forward passes."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self._gather(torch.tensor([count])).max())

    def _gather(self, row: Tensor) -> Tensor:
        """The rows of all processes, from a row on any device: NCCL takes only tensors on the process's own device."""
        if self.accelerator.num_processes == 1:
            return row
        return self.accelerator.gather(row.to(self.args.device))

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values.cpu()
        return self._gather(values[None]).sum(0).cpu()
