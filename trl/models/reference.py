"""Reference policies: what the model found likely before it was trained.

    log π_ref(y_t | x, y_<t)   [N,C],   without gradient

A reference starts as *the model that was given*, whatever was done to its weights in memory; it is never read again
from the name that the model once had. What stands behind it:

    FrozenModel      a copy of its own, or another model
    AdapterOff       the model in training, without its new adapter
    EarlierWeights   the model in training, its trained parameters put back for the moment to what they were
    NamedAdapter     the model in training, with another of its adapters
    Precomputed      numbers computed beforehand
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.errors import ConfigError, ModelError
from trl.models.score import score
from trl.types import Batch

NEUTRAL_STARTS = (True, False, "gaussian", "eva")
"""`init_lora_weights` that leave the base model's weights as they are. PiSSA, OLoRA, … move a part into the adapter."""


class Reference(Protocol):
    """What a trainer needs of a reference policy."""

    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """log π_ref `[N,C]` of the batch's completions, without gradient; zero where they are not scored.

        `policy` is the model in training, as it is wrapped.
        """
        ...


@dataclass(frozen=True)
class FrozenModel:
    """A model that is not trained."""

    model: nn.Module

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        return score(self.model, batch, temperature=temperature).logprobs


@dataclass(frozen=True)
class AdapterOff:
    """The model in training with its adapter switched off."""

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        with evaluating(policy), _adapted(policy).disable_adapter():
            return score(policy, batch, temperature=temperature).logprobs


@dataclass(frozen=True)
class NamedAdapter:
    """The model in training with the adapter `reference` in place of `trained`."""

    trained: str
    reference: str

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        adapted = _adapted(policy)
        with evaluating(policy):
            adapted.set_adapter(self.reference)
            try:
                return score(policy, batch, temperature=temperature).logprobs
            finally:
                adapted.set_adapter(self.trained)


@dataclass(frozen=True)
class EarlierWeights:
    """The model in training, with the parameters that are trained put back to `weights` for the moment.

    For an adapter that was trained before: memory for the adapter's weights, not the model's.
    """

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, policy: nn.Module) -> EarlierWeights:
        """The trainable parameters as they are now."""
        return cls({n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad})

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        parameters = dict(extract_model_from_parallel(policy, keep_fp32_wrapper=True).named_parameters())
        trained = [parameters[name] for name in self.weights]
        now = [parameter.detach().clone() for parameter in trained]
        torch._foreach_copy_(trained, list(self.weights.values()))
        try:
            with evaluating(policy):
                return score(policy, batch, temperature=temperature).logprobs
        finally:
            torch._foreach_copy_(trained, now)


@dataclass(frozen=True)
class Precomputed:
    """The signal `ref_logprobs` that rows carry with them; `other` is asked about batches without it."""

    other: Reference | None = None

    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        if "ref_logprobs" in batch.signals:
            return batch.signals["ref_logprobs"]
        if self.other is None:
            raise ConfigError(
                "These rows were encoded without reference log-probabilities, and the reference is gone. Give "
                "eval_dataset to the trainer when it is made, or set precompute_ref_log_probs=False."
            )
        return self.other.logprobs(policy, batch, temperature=temperature)


def make_reference(policy: nn.Module, *, has_new_adapter: bool = False) -> Reference:
    """A reference that is `policy` as it is now, with as little memory as that takes.

    `has_new_adapter` says that the adapter was put on just now, so that without it the model is the one that was given.
    """
    if not isinstance(policy, PeftModel):
        return FrozenModel(create_reference_model(policy))
    if has_new_adapter and _leaves_base_alone(policy):
        return AdapterOff()
    return EarlierWeights.of(policy)


def _leaves_base_alone(model: PeftModel) -> bool:
    """Whether training the active adapter leaves the model without it as it was given."""
    options = model.peft_config[model.active_adapter].to_dict()
    return options.get("bias", "none") == "none" and options.get("init_lora_weights", True) in NEUTRAL_STARTS


def _adapted(policy: nn.Module) -> PeftModel:
    return extract_model_from_parallel(policy, keep_fp32_wrapper=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, without dropout, for the moment."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def create_reference_model(
    model: PreTrainedModel, num_shared_layers: int | None = None, pattern: str | None = None
) -> PreTrainedModel:
    """A frozen copy of `model`, in evaluation mode.

    With `num_shared_layers`, the embeddings and the first so many layers are not copied: both models use the same
    parameters, and they are frozen in both. `pattern` says how the parameters of a layer are named, as in
    "transformer.h.{layer}"; it is found by itself for the models of `transformers`.

    Raises ModelError if no parameter is named so.
    """
    shared = [] if num_shared_layers is None else _lower_parameters(model, num_shared_layers, pattern)
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return reference.eval()


def _lower_parameters(model: nn.Module, layers: int, pattern: str | None) -> list[nn.Parameter]:
    """What the model registers before layer number `layers`: its embeddings, and the layers below."""
    pattern = pattern or _layer_pattern(model)
    above = pattern.format(layer=layers) + "."
    names = [name for name, _ in model.named_parameters()]
    border = next((i for i, name in enumerate(names) if above in name), None)
    if layers < 1 or border is None:
        raise ModelError(
            f"num_shared_layers={layers} and pattern={pattern!r}: {type(model).__name__} has no parameters named "
            f"{above}…, the first layer that would not be shared. Its parameters are named {names[len(names) // 2]!r} "
            f"and so on, and it has {_depth(model)} layers, of which 1 to {_depth(model) - 1} can be shared."
        )
    return [model.get_parameter(name) for name in names[:border]]


def _layer_pattern(model: nn.Module) -> str:
    """How the model's layers are named; those of the decoder if there are two stacks."""
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == _depth(model)]
    if not stacks:
        raise ModelError(
            f"The layers of this {type(model).__name__} were not found: name them, as in pattern='model.layers.{{layer}}'."
        )
    shallowest = min(name.count(".") for name in stacks)
    return [name for name in stacks if name.count(".") == shallowest][-1] + ".{layer}"


def _depth(model: nn.Module) -> int:
    return model.config.get_text_config().num_hidden_layers
