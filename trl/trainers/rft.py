"""Rejection-sampling fine-tuning: fine-tune on the model's best samples, above a threshold that rises.

    sample n per prompt ──▶ keep those at the percentile ──▶ fine-tune ──▶ raise the percentile, keep, fine-tune ──▶ … ──▶ sample

See `trl.algorithms.rft`. An improvement step takes the place of a rollout batch in other online trainers. Batch sizes count
sampled completions, of which only the kept ones are trained on.

RFTTrainer(model, reward_funcs=short, args=RFTConfig(...), train_dataset=prompts).train()
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from trl.algorithms.rft import RFT, RFTOptions, first_of_each
from trl.models.score import score
from trl.rollouts.buffer import Minibatch
from trl.rollouts.experience import (
    Group,
    experience_of,
    minibatches_from,
    split_into_minibatches,
    state_of,
    without_signals,
)
from trl.trainers.online import OnlineTrainer
from trl.trainers.online_config import OnlineConfig
from trl.types import Batch, Example, Experience, Metrics

logger = logging.getLogger(__name__)


@dataclass
class RFTConfig(RFTOptions, OnlineConfig):
    """Options of `RFTTrainer`."""

    ALIASES: ClassVar[dict[str, str]] = {
        **OnlineConfig.ALIASES,
        "n_generations_per_prompt": "num_generations",
        "n_rollouts": "num_generations",
    }

    learning_rate: float = 1e-5

    num_generations: int = 32
    """Completions of each prompt, of which the best are kept."""

    per_device_train_batch_size: int = 32
    """Sampled completions per minibatch; only the kept ones among them are trained on."""

    num_prompts: int | None = None
    """Prompts per sampling, on each process. None: per_device_train_batch_size × steps_per_generation /
    num_generations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_options()
        self.refuse("recompute_old_logprobs")

    @property
    def prompts_per_rollout_batch(self) -> int:
        """Prompts per sampling, on each process."""
        return super().prompts_per_rollout_batch if self.num_prompts is None else self.num_prompts

    def check_batches(self) -> None:
        """Raise ConfigError if the batch sizes do not make whole groups; with `num_prompts` they always do."""
        if self.num_prompts is None:
            super().check_batches()

    def make_algorithm(self) -> RFT:
        """The algorithm that these options describe."""
        return RFT(**{name: getattr(self, name) for name in RFTOptions.__dataclass_fields__})


@dataclass(frozen=True)
class Drawn:
    """The latest samples: the examples, their experience, and which completions may be trained on."""

    examples: list[Example] = field(default_factory=list)
    experience: Experience | None = None
    usable: list[bool] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """The state in a checkpoint, which `from_state` reads."""
        if self.experience is None:
            return {}
        experience = {name: getattr(self.experience, name) for name in ("rewards", "group", "mask")}
        return {"examples": state_of([self.examples]), "usable": self.usable, **experience}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Drawn:
        if not state:
            return cls()
        experience = Experience(state["rewards"], state["group"], state["mask"])
        return cls(minibatches_from(state["examples"])[0], experience, list(state["usable"]))


class RFTTrainer(OnlineTrainer):
    """Sample completions, keep the best, and fine-tune on them. The arguments are those of `OnlineTrainer`."""

    config_class = RFTConfig
    algorithm: RFT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.drawn = Drawn()
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.buffer.per_epoch is not None:
            self.buffer.per_epoch *= self.args.n_improve_steps  # an epoch samples every prompt once
        return loader

    # ---- an improvement step ----

    def roll_out(self) -> list[Minibatch]:
        """The kept completions of this improvement step, in minibatches; every `n_improve_steps` it samples anew."""
        step, groups = self.algorithm.step, []
        if step % self.args.n_improve_steps == 0:
            groups = self._draw()
        experience = self.with_advantages(self.drawn.experience, "train")
        if groups:
            self._log_rollouts(groups, experience, "train")
        keep = self._selected(self.drawn, experience)
        self._count("kept_share", sum(keep), len(keep))
        self._count("percentile", self.algorithm.percentile(step))
        if not any(keep):
            logger.warning(
                f"No completion reaches the threshold of improvement step {step + 1}: nothing is learned in this step."
            )
        count = self.args.minibatches_per_rollout_batch
        return split_into_minibatches(self.drawn.examples, keep, count, self.micro_batch_budget())

    def _draw(self) -> list[Group]:
        """Sample and reward completions, and keep them for the improvement steps."""
        groups = self.sample_rollout_batch()
        examples = [group.example for group in groups]
        local = experience_of(examples, self.sampler.combined(groups))
        experience = Experience(local.rewards, local.group, local.mask)
        self.drawn = Drawn(_without_any_signals(examples), experience, super().kept(groups, experience))
        return groups

    def kept(self, groups: Sequence[Group], experience: Experience) -> list[bool]:
        examples = [group.example for group in groups]
        return self._selected(Drawn(examples, experience, super().kept(groups, experience)), experience)

    def _selected(self, drawn: Drawn, experience: Experience) -> list[bool]:
        """Which completions reach the threshold of their prompt; of equal texts only the first."""
        reached = experience.signals["reached"].bool().tolist()
        candidates = [a and b for a, b in zip(reached, drawn.usable, strict=True)]
        return first_of_each(prompts_and_texts(drawn.examples, self.tokenizer), candidates)

    # ---- loss ----

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        scores = score(model, batch, want={"entropy", "greedy"})
        loss, metrics = self.algorithm.loss(scores, batch)
        return loss * self._length_scale(batch), metrics

    # ---- checkpoints ----

    def _buffer_state(self) -> dict[str, Any]:
        return {**super()._buffer_state(), "drawn": self.drawn.state()}

    def _load_buffer(self, state: Mapping[str, Any]) -> None:
        super()._load_buffer(state)
        self.drawn = Drawn.from_state(state["drawn"])


def prompts_and_texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """For every completion the number of its prompt, and its text without special tokens, as reward functions get it.

    With special tokens, a sample that repeats them would not count as a duplicate of the plain text, though its reward is
    the same, and the model would learn to write them.
    """
    numbers = [i for i, example in enumerate(examples) for _ in example.completions]
    ids = [list(completion.ids) for example in examples for completion in example.completions]
    return list(zip(numbers, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True))


def _without_any_signals(examples: Sequence[Example]) -> list[Example]:
    names = {name for example in examples for completion in example.completions for name in completion.signals}
    return without_signals(examples, list(names))
