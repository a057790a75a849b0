"""Reference policies: log-probabilities under the model as it was before training.

    log π_ref(y_t | x, y_<t)   [N,C],   without gradient

The reference is *the model object that was passed*, including any change to its weights in memory; it is never loaded
again from the model's name. There are these kinds:

    FrozenModel         a frozen copy, or another model
    SharedTrunk         a frozen copy of the upper layers, which reads the hidden states of the policy's lower layers
    AdapterOff          the policy with its new adapter disabled
    SnapshotReference   the policy with its trained parameters set back temporarily to their initial values
    NamedAdapter        the policy with another of its adapters active
    Precomputed         log-probabilities computed before training
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from trl.counts import counted
from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.errors import ConfigError, ModelError
from trl.models.fused import fuse_as
from trl.models.graphs import capture_as
from trl.models.layer_sharing import depth, layer_pattern, layers_of, recording, resuming
from trl.models.layouts import TRIAL
from trl.models.patching import evaluating
from trl.models.score import prepare_scoring, score, unwrap, without_wrapper
from trl.models.sharding import is_whole
from trl.models.varlen import attend_as
from trl.ops.products import exact_products
from trl.types import Batch, Scores

logger = logging.getLogger(__name__)

NEUTRAL_STARTS = (True, False, "gaussian", "eva")
"""Values of `init_lora_weights` that do not change the base weights; PiSSA, OLoRA, … move a part of them to the adapter."""


class Reference(Protocol):
    """The interface of reference policies."""

    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """log π_ref `[N,C]` of the batch's completions, without gradient; zero for tokens that are not scored.

        `policy` is the model in training, with its wrapper (DDP, FSDP2, …).
        """
        ...

    def as_model(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """A model that is the reference within the context, to sample from or to compute whole distributions.

        Raises ModelError for precomputed log-probabilities.
        """
        ...


class _Scored:
    """A reference that scores with the model that `as_model` gives."""

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        with self.as_model(policy) as model:
            return score(model, batch, temperature=temperature).logprobs


@dataclass(frozen=True)
class FrozenModel(_Scored):
    """A model that is not trained."""

    model: nn.Module

    @contextmanager
    def as_model(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self.model


@dataclass(frozen=True)
class SharedTrunk(FrozenModel):
    """A frozen model that shares all layers below index `start` with the policy: see `score_with_reference`."""

    start: int


@dataclass(frozen=True)
class AdapterOff(_Scored):
    """The policy with its adapter disabled."""

    @contextmanager
    def as_model(self, policy: nn.Module) -> Iterator[nn.Module]:
        with evaluating(policy), without_wrapper(policy).disable_adapter():
            yield policy


@dataclass(frozen=True)
class NamedAdapter(_Scored):
    """The policy with the adapter `reference` active in place of `trained`."""

    trained: str
    reference: str

    @contextmanager
    def as_model(self, policy: nn.Module) -> Iterator[nn.Module]:
        adapted = without_wrapper(policy)
        with evaluating(policy):
            adapted.set_adapter(self.reference)
            try:
                yield policy
            finally:
                adapted.set_adapter(self.trained)


@dataclass(frozen=True)
class SnapshotReference(_Scored):
    """The policy with its trained parameters set to `weights` temporarily.

    For an adapter that was trained before: the copy takes the memory of the adapter, not of the model.
    """

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, policy: nn.Module) -> SnapshotReference:
        """The trainable parameters as they are now."""
        return cls({n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad})

    @contextmanager
    def as_model(self, policy: nn.Module) -> Iterator[nn.Module]:
        if not is_whole(without_wrapper(policy)):
            raise ModelError(
                "The reference is this model with its adapter as it was before training, which cannot be restored from the "
                "shards of FSDP2 or ZeRO-3: use DDP or ZeRO-2, or load the adapter twice and name the second one in "
                "ref_adapter_name."
            )
        parameters = dict(without_wrapper(policy).named_parameters())
        trained = [parameters[name] for name in self.weights]
        now = [parameter.detach().clone() for parameter in trained]
        with torch.no_grad():
            torch._foreach_copy_(trained, list(self.weights.values()))
        try:
            with evaluating(policy):
                yield policy
        finally:
            with torch.no_grad():
                torch._foreach_copy_(trained, now)


@dataclass(frozen=True)
class Precomputed:
    """Reads `ref_logprobs` from the batch's signals; batches without it are scored by `other`."""

    other: Reference | None = None

    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        if "ref_logprobs" in batch.signals:
            return batch.signals["ref_logprobs"]
        if self.other is None:
            raise ConfigError(
                "These rows have no precomputed reference log-probabilities, and the reference model is no longer in memory. "
                "Pass eval_dataset when you create the trainer, or set precompute_ref_log_probs=False."
            )
        return self.other.logprobs(policy, batch, temperature=temperature)

    def as_model(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        raise ModelError(
            "With precomputed reference log-probabilities there is no reference model to sample from: set "
            "precompute_ref_log_probs=False."
        )


@torch.no_grad()
def score_with_reference(
    policy: nn.Module, reference: Reference, batch: Batch, *, temperature: float = 1.0, want: Collection[str] = ()
) -> tuple[Scores, Tensor]:
    """Scores of the policy, and log π_ref `[N,C]`, both without gradient; layers that they share run once."""
    if not isinstance(reference, SharedTrunk):
        found = score(policy, batch, temperature=temperature, want=want)
        return found, reference.logprobs(policy, batch, temperature=temperature)
    prepare_scoring(unwrap(policy))
    with evaluating(policy), recording(unwrap(policy), reference.start) as lower:
        found = score(policy, batch, temperature=temperature, want=want)
    with resuming(unwrap(reference.model), reference.start, lower):
        return found, score(reference.model, batch, temperature=temperature).logprobs


def frozen_reference(
    policy: PreTrainedModel,
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> FrozenModel:
    """Make `model` the reference of `policy`. Lower layers whose parameters they share run once for both.

    Sharing is checked on a few tokens first, in the precision of training, which `autocast` enables. If the results differ,
    the whole reference runs, and a warning says why.
    """
    prepare_scoring(unwrap(model))
    attend_as(unwrap(model), policy)
    fuse_as(unwrap(model), policy)
    capture_as(unwrap(model), policy)
    whole, start = FrozenModel(model), _shared_layers(policy, unwrap(model))
    if start == 0 or is_deepspeed_zero3_enabled():
        return whole
    shared = SharedTrunk(model, start)
    with autocast(), exact_products():
        reason = _why_not_resumed(policy, shared, whole)
    if reason:
        logger.warning(
            f"Policy and reference share {start} layers, but the reference has to compute them again: {reason}."
        )
        return whole
    return shared


def _shared_layers(policy: PreTrainedModel, model: PreTrainedModel) -> int:
    """The number of lower layers whose parameters, and those of all modules before them, are the same objects in both."""
    if type(policy) is not type(model) or depth(policy) != depth(model):
        return 0
    own = dict(policy.named_parameters())
    stack = layer_pattern(model)
    first_different = next((name for name, p in model.named_parameters() if p is not own.get(name)), None)
    if first_different is None:
        return 0
    return next((n for n in range(1, depth(model)) if stack.format(layer=n) + "." in first_different), 0)


def _why_not_resumed(policy: PreTrainedModel, shared: SharedTrunk, whole: FrozenModel) -> str:
    """Why the reference's upper layers cannot run on the policy's hidden states; empty if they can."""
    if policy.config.is_encoder_decoder:
        start = policy.config.decoder_start_token_id
        batch = lay_out_encoder_decoder(TRIAL[:1], pad_token_id=0, decoder_start_token_id=start)
    else:
        batch = lay_out(TRIAL)
    batch = batch.to(policy.device)
    expected = whole.logprobs(policy, batch)
    if not_shared := _not_shared_below(policy, shared, batch):
        return f"{not_shared[0]!r} is not shared, and runs before the last of them"
    try:
        _, found = score_with_reference(policy, shared, batch)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        return f"its upper layers cannot run alone ({type(error).__name__}: {str(error).splitlines()[0]})"
    worst = (found - expected).abs().max().item()
    exact = policy.dtype == torch.float32 and not torch.is_autocast_enabled(policy.device.type)
    tolerance = 1e-4 if exact else 5e-2
    return "" if worst < tolerance else f"with its upper layers alone, log-probabilities differ by {worst:.2g}"


@torch.no_grad()
def _not_shared_below(policy: PreTrainedModel, shared: SharedTrunk, batch: Batch) -> list[str]:
    """Names of modules that policy and reference do not share, but that run before the last shared layer."""
    theirs, called = dict(unwrap(shared.model).named_parameters()), []
    different = {name.rpartition(".")[0] for name, p in policy.named_parameters() if p is not theirs[name]}
    modules = {**{name: policy.get_submodule(name) for name in different}, "": layers_of(policy)[shared.start - 1]}
    with ExitStack() as hooks:
        for n, m in modules.items():
            hooks.enter_context(m.register_forward_hook(lambda module, args, out, name=n: called.append(name)))
        score(policy, batch)
    return called[: called.index("")]


def make_reference(policy: nn.Module, *, has_new_adapter: bool = False) -> Reference:
    """Make the present state of `policy` the reference, with as little memory as possible.

    `has_new_adapter` says that the adapter was just added, so that the reference is the model without it.
    """
    if not isinstance(policy, PeftModel):
        return FrozenModel(create_reference_model(policy))
    if has_new_adapter and _leaves_base_alone(policy):
        return AdapterOff()
    return SnapshotReference.of(policy)


def _leaves_base_alone(model: PeftModel) -> bool:
    """Whether neither the initialisation nor the training of the active adapter changes the base model."""
    options = model.peft_config[model.active_adapter].to_dict()
    return options.get("bias", "none") == "none" and options.get("init_lora_weights", True) in NEUTRAL_STARTS


def create_reference_model(
    model: PreTrainedModel, num_shared_layers: int | None = None, pattern: str | None = None
) -> PreTrainedModel:
    """A frozen copy of `model`, in evaluation mode.

    With `num_shared_layers`, the embeddings and that many lower layers are not copied: both models use the same
    parameters, frozen in both. `pattern` says how the parameters of a layer are named, for example
    "transformer.h.{layer}"; for models of `transformers` it is found automatically.

    Raises ModelError if no parameter matches the pattern.
    """
    shared = [] if num_shared_layers is None else _lower_parameters(unwrap(model), num_shared_layers, pattern)
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return reference.eval()


def _lower_parameters(model: PreTrainedModel, layers: int, pattern: str | None) -> list[nn.Parameter]:
    """The parameters that the model registers before layer `layers`: those of the embeddings and of the layers below."""
    pattern = pattern or layer_pattern(model)
    above = pattern.format(layer=layers) + "."
    names = [name for name, _ in model.named_parameters()]
    end = next((i for i, name in enumerate(names) if above in name), None)
    if layers < 1 or end is None:
        raise ModelError(
            f"num_shared_layers={layers} and pattern={pattern!r}: {type(model).__name__} has no parameters named "
            f"{above}…, the first layer that would not be shared. Its parameters have names such as "
            f"{names[len(names) // 2]!r}, and it has {counted(depth(model), 'layer')}, of which at least one cannot be shared."
        )
    return [model.get_parameter(name) for name in names[:end]]
