"""Orders of rows by length. They follow from the seed and the epoch, so that a resumed run reads the same rows as one that never
stopped, on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from trl.errors import ConfigError

STRATEGIES = ("group_by_length", "batch_rebalance")
"""Values of train_sampling_strategy that depend on lengths."""


def sampler_by_length(lengths: Sequence[int], args: TrainingArguments, epoch: Callable[[], int]) -> Sampler:
    """The sampler of `args.train_sampling_strategy` for rows of these lengths; `epoch` is called at the start of every epoch."""
    make: Callable[..., Sampler] = (
        GroupedByLength if args.train_sampling_strategy == "group_by_length" else _balanced_class()
    )
    return make(lengths, args, epoch)


class GroupedByLength(LengthGroupedSampler):
    """Groups rows of similar length into the same optimizer step."""

    def __init__(self, lengths: Sequence[int], args: TrainingArguments, epoch: Callable[[], int]) -> None:
        super().__init__(args.train_batch_size * args.gradient_accumulation_steps, lengths=list(lengths))
        self.seed, self.epoch_now = args.seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch_now())
        return super().__iter__()


def _balanced_class() -> type[Sampler]:
    """A sampler that shares the rows of an optimizer step out by length, so that no process waits long for another."""
    try:
        from transformers.trainer_pt_utils import BatchRebalanceSampler
    except ImportError as error:
        raise ConfigError("train_sampling_strategy='batch_rebalance' needs a newer release of transformers.") from error

    class Balanced(BatchRebalanceSampler):
        def __init__(self, lengths: Sequence[int], args: TrainingArguments, epoch: Callable[[], int]) -> None:
            slots = args.world_size * args.gradient_accumulation_steps
            super().__init__(
                list(lengths),
                effective_batch_size=args.train_batch_size * slots,
                dp_size=args.world_size,
                grad_accum=args.gradient_accumulation_steps,
                seed=args.seed,
                rank=args.process_index,
                drop_last=args.dataloader_drop_last,
            )
            self.epoch_now = epoch

        def __iter__(self) -> Iterator[list[int]]:
            self.set_epoch(self.epoch_now())
            return super().__iter__()

    return Balanced
