"""Rewards of completions, from a sequence classifier with one label.

    r[n]   = head(hidden state of completion n's last token)
    r[n,t] = head(hidden state of token t)                     (process rewards)

The classifiers of `transformers` find a row's last token by its padding, and refuse batches without a pad token. Here
the position is known, so padding and pad token do not matter, and completions of one prompt can share it in one row. As in
`trl.models.score`, the head runs inside the model's forward, on the selected hidden states only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.errors import ModelError
from trl.models.patching import is_patched, patch_forward, with_self
from trl.models.rotary import rotate_by_own_length
from trl.models.score import segment_attention, unwrap
from trl.types import Batch
from trl.vision.blank import read_blank
from trl.vision.encoder_outputs import with_encoder_outputs


def score_rewards(model: nn.Module, batch: Batch, *, per_token: bool = False) -> Tensor:
    """Rewards of the batch's completions in float32: `[N]`, or with `per_token` `[N,C]` (zero for tokens not scored).

    `model` is an `AutoModelForSequenceClassification` with one label, wrapped (DDP, FSDP2, …) or not.
    """
    inner = unwrap(model)
    prepare_rewards(inner)
    if not _reads_positions(inner):
        return _of_whole_rows(model, batch, per_token)
    index = batch.position.flatten()[batch.scored] if per_token else batch.last
    rewards = model(**with_encoder_outputs(batch.inputs), **segment_attention(inner, batch), reward_at=index).float()
    if not per_token:
        return rewards
    return rewards.new_zeros(batch.mask.numel()).index_copy(0, batch.scored, rewards).view_as(batch.mask)


def prepare_rewards(model: PreTrainedModel) -> None:
    """Patch the forward of a classifier to take the keyword `reward_at`. A second call has no effect.

    Raises ModelError unless the model has exactly one label.
    """
    kinds = model.config.architectures or ()
    if model.config.num_labels != 1 and any("CausalLM" in kind for kind in kinds):
        raise ModelError(
            f"{model.config._name_or_path!r} is a language model ({kinds[0]}) and gives no rewards: name a reward model, such as "
            "`trl reward` trains. To train a reward model from it, give RewardTrainer its name, or "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
        )
    if model.config.num_labels != 1:
        raise ModelError(
            f"A reward model has one label, but this {type(model).__name__} has {model.config.num_labels}: load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
        )
    rotate_by_own_length(model)
    if _reads_positions(model) and not is_patched(model):
        patch_forward(model, _accepting_positions(model.forward))


def _reads_positions(model: PreTrainedModel) -> bool:
    """Whether the model can give rewards at any position: it is a decoder with a linear head named `score`."""
    return "score" in dict(model.named_children()) and not model.config.is_encoder_decoder


def _accepting_positions(plain: Callable) -> Callable:
    @functools.wraps(plain)
    def forward(self: PreTrainedModel, *args: Any, reward_at: Tensor | None = None, **kwargs: Any) -> Any:
        if reward_at is None:
            return self._trl_plain_forward(*args, **kwargs)
        kwargs, blank = read_blank(self, kwargs)
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state + blank()
        return self.score(hidden.flatten(0, 1).index_select(0, reward_at)).squeeze(-1)

    return with_self(forward, plain)


def _of_whole_rows(model: nn.Module, batch: Batch, per_token: bool) -> Tensor:
    """Rewards `[N]` of a classifier that pools whole rows (an encoder or encoder-decoder), from padded rows."""
    if per_token or batch.segments is not None or len(batch.inputs["input_ids"]) != len(batch.mask):
        raise ModelError(
            f"{type(unwrap(model)).__name__} gives one reward per row: it needs layout='padded', and has no rewards per token."
        )
    inputs = {name: value for name, value in batch.inputs.items() if name != "position_ids"}
    return model(**with_encoder_outputs(inputs)).logits.squeeze(-1).float()
