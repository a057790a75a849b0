"""The reference policy of a trainer: how it is chosen, and how it is updated with sync_ref_model=True."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from trl.errors import ConfigError
from trl.models.load import load_model, naming_keywords
from trl.models.reference import (
    FrozenModel,
    Reference,
    create_reference_model,
    frozen_reference,
    make_reference,
    score_with_reference,
)
from trl.models.score import prepare_scoring, score, unwrap
from trl.models.sharding import prepare_frozen, shards
from trl.trainers.config import ReferenceConfig
from trl.types import Batch

logger = logging.getLogger(__name__)

FOUND_IN_SCORES = {"old_logprobs": "logprobs", "values": "value", "entropy": "entropy"}
"""Signals of a rollout batch that the policy's forward pass gives → their names in `Scores`."""


def reference_for(
    policy: nn.Module,
    given: str | nn.Module | None,
    config: ReferenceConfig,
    accelerator: Accelerator,
    *,
    has_new_adapter: bool = False,
    loading: dict[str, Any] | None = None,
    copy: Callable[[nn.Module], nn.Module] = create_reference_model,
) -> Reference:
    """The reference of `policy`, a language model with or without adapters, on the trainer's device.

    given             a model, or the name of one, loaded with the arguments `loading`; None: the policy as it is now
    has_new_adapter   the trainer has just added the adapter, so the model without it is the initial policy
    copy              makes the frozen copy of a policy without adapters

    Raises ConfigError for sync_ref_model=True with an adapter.
    """
    if config.sync_ref_model and isinstance(policy, PeftModel):
        raise ConfigError(
            "sync_ref_model updates the weights of the reference, but with an adapter the reference shares its weights with "
            "the model: train without an adapter, or set sync_ref_model=False."
        )
    if given is None and isinstance(policy, PeftModel):
        return make_reference(policy, has_new_adapter=has_new_adapter)
    if given is None:
        model = copy(policy)
    else:
        subject = f"ref_model={given!r}"
        loading = loading or config.loading()
        with naming_keywords("ref_model_init_kwargs", loading, str(given)):
            model = load_model(given, subject=subject, **loading) if isinstance(given, str) else given
        warn_of_fewer_tokens(model, policy)
        model.requires_grad_(False).eval()
    if "hf_device_map" not in vars(unwrap(model)) and len({p.device for p in model.parameters()}) > 1:
        model.to(accelerator.device)  # a copy may share its lower layers with the policy, which has moved to the device
    prepare_scoring(unwrap(model))
    return frozen_reference(policy, prepare_frozen(accelerator, model), accelerator.autocast)


def warn_of_fewer_tokens(reference: nn.Module, policy: nn.Module) -> None:
    """Warn if the reference's vocabulary is smaller than the policy's."""
    known, needed = (
        getattr(unwrap(model).config.get_text_config(), "vocab_size", None) for model in (reference, policy)
    )
    if known is not None and needed is not None and known < needed:
        logger.warning(
            f"The reference has a vocabulary of {known:,} tokens, but the model one of {needed:,}: a row with one of the "
            "missing tokens will fail ('index out of range'). Give a reference with the model's vocabulary, or leave it out."
        )


def reference_models(reference: Reference | None) -> list[PreTrainedModel]:
    """The reference's model, in a list; an empty list if the reference has no separate model."""
    return [unwrap(reference.model)] if isinstance(reference, FrozenModel) else []


def score_signals(
    policy: nn.Module, reference: Reference | None, batch: Batch, wanted: Collection[str], *, temperature: float
) -> dict[str, Tensor]:
    """The signals `wanted` `[N,C]` of a batch, from at most one forward pass of the policy and one of the reference."""
    attributes = {name: FOUND_IN_SCORES[name] for name in wanted if name in FOUND_IN_SCORES}
    options = {"temperature": temperature, "want": set(attributes.values()) - {"logprobs"}}
    seen: dict[str, Tensor] = {}
    if "ref_logprobs" not in wanted:
        scores = score(policy, batch, **options)
    elif attributes:
        scores, seen["ref_logprobs"] = score_with_reference(policy, reference, batch, **options)
    else:
        return {"ref_logprobs": reference.logprobs(policy, batch, temperature=temperature)}
    return {**seen, **{name: getattr(scores, attribute) for name, attribute in attributes.items()}}


def sync_callbacks(reference: Reference | None, config: ReferenceConfig) -> list[SyncRefModelCallback]:
    """The callback that updates the reference, if sync_ref_model=True; else an empty list."""
    return (
        [SyncRefModelCallback(reference.model)] if config.sync_ref_model and isinstance(reference, FrozenModel) else []
    )


class SyncRefModelCallback(TrainerCallback):
    """Moves the reference towards the policy, π_ref ← α π + (1 − α) π_ref, every so many steps.

    TR-DPO, arXiv:2404.09656, Eq. 4; α and the steps are `ref_model_mixup_alpha` and `ref_model_sync_steps`.

    accelerator   accepted and not used: each process updates its own shards
    """

    def __init__(self, ref_model: nn.Module, accelerator: Accelerator | None = None) -> None:
        self.ref_model = ref_model

    def on_step_end(
        self, args: ReferenceConfig, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            mix(unwrap(self.ref_model), unwrap(model), args.ref_model_mixup_alpha)


@torch.no_grad()
def mix(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """Set the parameters of `reference` to α policy + (1 − α) reference; each process updates its own shards."""
    trained = shards(policy)
    for name, shard in shards(reference).items():
        shard.lerp_(trained[name].to(shard.dtype), alpha)
