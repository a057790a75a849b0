"""Learning from preferences without a reward model: direct preference optimisation and its family.

    loss = −log σ(β [h(y_w) − h(y_l)]),   h(y) = log π(y|x) − log π_ref(y|x);   for the others see `trl.algorithms.dpo`

DPOTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset).train()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trl.algorithms.dpo import DPO, DPOLoss, DPOOptions
from trl.algorithms.pairs import by_preference
from trl.errors import ConfigError
from trl.models.score import score
from trl.trainers.preference import PreferenceConfig, PreferenceTrainer
from trl.types import Batch, Metrics, Scores


@dataclass
class DPOConfig(DPOOptions, PreferenceConfig):
    """Options of `DPOTrainer`."""

    loss_type: DPOLoss | list[str] | str = field(default_factory=lambda: "sigmoid")  # as HfArgumentParser reads several
    """One loss or several, which are summed: "sigmoid" is that of the paper; see `trl.algorithms.dpo` for the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_algorithm()

    def make_algorithm(self) -> DPO:
        """The loss that these options describe. Raises ConfigError for those that do not go together."""
        return self.check_not_split(DPO(loss_types=self.loss_type, **self.options()))

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `DPO` other than `loss_types`."""
        return {name: getattr(self, name) for name in DPO.__dataclass_fields__ if name != "loss_types"}

    def check_not_split(self, algorithm: DPO) -> DPO:
        """Return `algorithm`. Raises ConfigError if it needs all pairs of a step at once and the options split the step."""
        split = self.gradient_accumulation_steps > 1 or self.max_tokens_per_micro_batch is not None
        if algorithm.needs_full_batch and split:
            raise ConfigError(
                f"loss_type={algorithm.loss_types} sorts the pairs of a batch, so a step cannot be split: set "
                "gradient_accumulation_steps=1, leave out max_tokens_per_micro_batch, and raise "
                "per_device_train_batch_size instead."
            )
        return algorithm


class DPOTrainer(PreferenceTrainer):
    """Train a causal or encoder-decoder language model on pairs of a better and a worse completion.

    Rows have `chosen` and `rejected`, and `prompt` unless it is the common beginning of both; texts, conversations, or
    token ids.
    Arguments: see `BaseTrainer` and `PreferenceTrainer`.
    """

    config_class = DPOConfig
    args: DPOConfig
    multiple_completions = True
    kinds: ClassVar[Sequence[str]] = ("tokenized_preference", "preference")

    @cached_property
    def algorithm(self) -> DPO:
        return self.args.make_algorithm()

    @property
    def needs_reference(self) -> bool:
        return self.algorithm.needs_reference

    def micro_batch_budget(self) -> int | None:
        """No limit for losses that sort the pairs of a batch, which must not be split."""
        return None if self.algorithm.needs_full_batch else super().micro_batch_budget()

    def weights(self, batch: Batch) -> Tensor:
        """Weight 1 for every pair, `[P]`."""
        return batch.mask.new_ones(len(batch.mask) // 2)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        batch = self.with_reference(model, batch)
        scores = score(model, batch, want={"entropy", "greedy", "mean_logit", *self.algorithm.wants})
        loss, metrics = self.algorithm.loss(scores, batch)
        return loss, {**metrics, **token_metrics(scores)}


def token_metrics(scores: Scores) -> Metrics:
    """Entropy and mean logit of the tokens `[N,C]` of pairs, and the greedy accuracy on chosen completions."""
    is_chosen = torch.arange(len(scores.logprobs), device=scores.logprobs.device) % 2 == 0
    return {
        "entropy": scores.entropy,
        "mean_token_accuracy": by_preference("accuracy", scores.greedy, is_chosen)["accuracy/chosen"],
        **by_preference("logits", scores.mean_logit, is_chosen),
    }
