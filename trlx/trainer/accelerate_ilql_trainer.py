"""Offline: ILQL of samples and rewards, on `trl.ILQLTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl.errors import DataError
from trl.trainers.ilql import ILQLConfig as TrlILQLConfig
from trl.trainers.ilql import ILQLTrainer
from trlx.models.modeling_ilql import ILQLConfig
from trlx.pipeline.offline_pipeline import dialogue_rows
from trlx.trainer import register_trainer
from trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from trlx.trainer.options import adapter_config, batches_of, steps_of_epochs
from trlx.trainer.schedules import Scheduled

LOSS_OPTIONS = ("tau", "gamma", "cql_scale", "awac_scale", "alpha", "beta", "steps_for_target_q_sync", "two_qs")

__all__ = ["AccelerateILQLTrainer", "ILQLConfig", "make_experience"]


class _ILQLTrainer(Scheduled, ILQLTrainer):
    """`ILQLTrainer` with the learning-rate schedule of a `scheduler` section."""


def make_experience(
    samples: Sequence[Any],
    rewards: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 2048,
    *,
    encoder_decoder: bool = False,
) -> Dataset:
    """Convert samples and rewards to rows of `ILQLTrainer`: token ids, a mask of outputs, and the reward.

    Raises DataError if their numbers differ, and for malformed dialogues.
    """
    if len(samples) != len(rewards):
        raise DataError(
            f"{len(samples)} samples and {len(rewards)} rewards were given: give one reward for each sample."
        )
    rows = dialogue_rows(samples, tokenizer, max_length, encoder_decoder=encoder_decoder)
    return Dataset.from_list([{**row, "reward": _plain(rewards[i], i)} for i, row in enumerate(rows)])


def _plain(reward: Any, i: int) -> float | list[float]:
    """Convert reward `i` to a float or a list of floats. Raises DataError if it is neither."""
    reward = reward.tolist() if hasattr(reward, "tolist") else reward
    try:
        return [float(r) for r in reward] if isinstance(reward, list | tuple) else float(reward)
    except (TypeError, ValueError) as error:
        raise DataError(f"rewards[{i}] is {reward!r:.60}: give a number, or a list of one for each token.") from error


@register_trainer
class AccelerateILQLTrainer(AccelerateRLTrainer):
    """Learns Q-values from samples and rewards, and uses them to guide sampling. Arguments: see `AccelerateRLTrainer`."""

    method_class = ILQLConfig
    has_value_head = True

    def add_samples(self, samples: Sequence[Any], rewards: Sequence[Any] | None) -> None:
        length = self.config.train.seq_length
        self.rows = make_experience(
            samples, [] if rewards is None else rewards, self.tokenizer, length, encoder_decoder=self.seq2seq
        )

    def make_trainer(self) -> ILQLTrainer:
        train, method = self.config.train, self.config.method
        args = TrlILQLConfig(
            **self.common_options(),
            **{name: getattr(method, name) for name in LOSS_OPTIONS},
            max_steps=steps_of_epochs(train, batches_of(len(self.rows), train)),
            max_length=None,
        )
        self.freeze()
        return _ILQLTrainer(
            self.given_model,
            args,
            self.rows,
            scheduler=self.config.scheduler,
            peft_config=adapter_config(self.config.model.peft_config),
            **self.common_keywords(),
        )
