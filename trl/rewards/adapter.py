"""A reward model that is an adapter on the policy's base model.

r = w · h_last + b,     h the hidden states of the base model with the reward adapter active
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.errors import ModelError
from trl.models.value_heads.auto_models import WithValueHead
from trl.rewards.model import TOKENS_PER_BATCH, RewardModel, tokenization_of
from trl.types import Batch


class AdapterReward(RewardModel):
    """The reward adapter of a model with a value head, as a function `(prompts, completions, **columns) -> rewards`.

    model   loaded with `from_pretrained(..., peft_config=..., reward_adapter=...)`; it may be the policy in training

    `read_with` has to be called before the first rewards.
    """

    def __init__(self, model: WithValueHead) -> None:
        if model.config.is_encoder_decoder:
            raise ModelError(
                "Reward adapters need a decoder-only model, which reads prompt and completion as one text."
            )
        self.model, self.layout, self.images = model, "padded", None
        self.max_length, self.tokens_per_batch = None, TOKENS_PER_BATCH
        self.__name__ = model.reward_adapter_name

    def read_with(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use `tokenizer` to encode prompts and completions."""
        self.tokenizer, self.tokenization = tokenizer, tokenization_of(tokenizer)

    def to(self, device: torch.device) -> None:
        """Do nothing: the policy's weights are already on its device."""

    def _score(self, batch: Batch) -> Tensor:
        rewards = self.model.compute_reward_score(**batch.inputs)
        return rewards[..., 0].flatten().index_select(0, batch.last).float()
