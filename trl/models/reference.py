"""Reference policies: what the model found likely before it was trained.

    log π_ref(y_t | x, y_<t)   [N,C],   without gradient

A reference starts as *the model that was given*, whatever was done to its weights in memory; it is never read again
from the name that the model once had. What stands behind it:

    FrozenModel         a copy of its own, or another model
    SharedTrunk         a copy of the upper layers alone, on what the policy's lower layers give
    AdapterOff          the model in training, without its new adapter
    SnapshotReference   the model in training, its trained parameters put back for the moment to what they were
    NamedAdapter        the model in training, with another of its adapters
    Precomputed         numbers computed beforehand
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
"""`init_lora_weights` that leave the base model's weights as they are. PiSSA, OLoRA, … move a part into the adapter."""


class Reference(Protocol):
    """What a trainer needs of a reference policy."""

    def logprobs(self, policy: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """log π_ref `[N,C]` of the batch's completions, without gradient; zero where they are not scored.

        `policy` is the model in training, as it is wrapped.
        """
        ...

    def as_model(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """The model that behaves as the reference meanwhile, to sample from or to ask for whole distributions.

        Raises ModelError where the reference is numbers.
        """
        ...


class _Scored:
    """A reference whose log-probabilities are those of the model that stands in for it."""

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
    """A model that is not trained, whose layers below number `start` are the policy's own: see `score_with_reference`."""

    start: int


@dataclass(frozen=True)
class AdapterOff(_Scored):
    """The model in training with its adapter switched off."""

    @contextmanager
    def as_model(self, policy: nn.Module) -> Iterator[nn.Module]:
        with evaluating(policy), without_wrapper(policy).disable_adapter():
            yield policy


@dataclass(frozen=True)
class NamedAdapter(_Scored):
    """The model in training with the adapter `reference` in place of `trained`."""

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
    """The model in training, with the parameters that are trained put back to `weights` for the moment.

    For an adapter that was trained before: memory for the adapter's weights, not the model's.
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
                "The reference is this model as it was given, with the adapter that it had, and FSDP2 and ZeRO-3 keep shards "
                "of that: use DDP or ZeRO-2, or load the adapter twice and name the second one in ref_adapter_name."
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

    def as_model(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        raise ModelError("A reference that was computed beforehand is numbers, not a model: it cannot be sampled from.")


@torch.no_grad()
def score_with_reference(
    policy: nn.Module, reference: Reference, batch: Batch, *, temperature: float = 1.0, want: Collection[str] = ()
) -> tuple[Scores, Tensor]:
    """Scores of the policy and log π_ref `[N,C]`, without gradient; layers that both have in common run once."""
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
    """`model` as the reference of `policy`. Lower layers that are the same parameters run once for both.

    That is tried on a few tokens first, in the precision of training, which `autocast` switches on: where an architecture
    does not allow it, the reference runs whole, and a warning says why.
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
            f"Policy and reference have {start} layers in common, but the reference runs them by itself: {reason}."
        )
        return whole
    return shared


def _shared_layers(policy: PreTrainedModel, model: PreTrainedModel) -> int:
    """The number of lower layers that are, with all before them, the same parameters in both."""
    if type(policy) is not type(model) or depth(policy) != depth(model):
        return 0
    own = dict(policy.named_parameters())
    stack = layer_pattern(model)
    border = next((name for name, p in model.named_parameters() if p is not own.get(name)), None)
    if border is None:
        return 0
    return next((n for n in range(1, depth(model)) if stack.format(layer=n) + "." in border), 0)


def _why_not_resumed(policy: PreTrainedModel, shared: SharedTrunk, whole: FrozenModel) -> str:
    """Why the upper layers cannot run alone; empty if they can."""
    if policy.config.is_encoder_decoder:
        start = policy.config.decoder_start_token_id
        batch = lay_out_encoder_decoder(TRIAL[:1], pad_token_id=0, decoder_start_token_id=start)
    else:
        batch = lay_out(TRIAL)
    batch = batch.to(policy.device)
    expected = whole.logprobs(policy, batch)
    if apart := _apart_below(policy, shared, batch):
        return f"{apart[0]!r} is not among them and runs before they end"
    try:
        _, found = score_with_reference(policy, shared, batch)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        return f"its upper layers do not run alone ({type(error).__name__}: {str(error).splitlines()[0]})"
    worst = (found - expected).abs().max().item()
    exact = policy.dtype == torch.float32 and not torch.is_autocast_enabled(policy.device.type)
    tolerance = 1e-4 if exact else 5e-2
    return "" if worst < tolerance else f"its upper layers alone give numbers that differ by {worst:.2g}"


@torch.no_grad()
def _apart_below(policy: PreTrainedModel, shared: SharedTrunk, batch: Batch) -> list[str]:
    """Modules that policy and reference have one each of, and that run before the layers in common have."""
    theirs, called = dict(unwrap(shared.model).named_parameters()), []
    apart = {name.rpartition(".")[0] for name, p in policy.named_parameters() if p is not theirs[name]}
    modules = {**{name: policy.get_submodule(name) for name in apart}, "": layers_of(policy)[shared.start - 1]}
    with ExitStack() as hooks:
        for n, m in modules.items():
            hooks.enter_context(m.register_forward_hook(lambda module, args, out, name=n: called.append(name)))
        score(policy, batch)
    return called[: called.index("")]


def make_reference(policy: nn.Module, *, has_new_adapter: bool = False) -> Reference:
    """A reference that is `policy` as it is now, with as little memory as that takes.

    `has_new_adapter` says that the adapter was put on just now, so that without it the model is the one that was given.
    """
    if not isinstance(policy, PeftModel):
        return FrozenModel(create_reference_model(policy))
    if has_new_adapter and _leaves_base_alone(policy):
        return AdapterOff()
    return SnapshotReference.of(policy)


def _leaves_base_alone(model: PeftModel) -> bool:
    """Whether training the active adapter leaves the model without it as it was given."""
    options = model.peft_config[model.active_adapter].to_dict()
    return options.get("bias", "none") == "none" and options.get("init_lora_weights", True) in NEUTRAL_STARTS


def create_reference_model(
    model: PreTrainedModel, num_shared_layers: int | None = None, pattern: str | None = None
) -> PreTrainedModel:
    """A frozen copy of `model`, in evaluation mode.

    With `num_shared_layers`, the embeddings and the first so many layers are not copied: both models use the same
    parameters, and they are frozen in both. `pattern` says how the parameters of a layer are named, as in
    "transformer.h.{layer}"; it is found by itself for the models of `transformers`.

    Raises ModelError if no parameter is named so.
    """
    shared = [] if num_shared_layers is None else _lower_parameters(unwrap(model), num_shared_layers, pattern)
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return reference.eval()


def _lower_parameters(model: PreTrainedModel, layers: int, pattern: str | None) -> list[nn.Parameter]:
    """What the model registers before layer number `layers`: its embeddings, and the layers below."""
    pattern = pattern or layer_pattern(model)
    above = pattern.format(layer=layers) + "."
    names = [name for name, _ in model.named_parameters()]
    border = next((i for i, name in enumerate(names) if above in name), None)
    if layers < 1 or border is None:
        raise ModelError(
            f"num_shared_layers={layers} and pattern={pattern!r}: {type(model).__name__} has no parameters named "
            f"{above}…, the first layer that would not be shared. Its parameters are named {names[len(names) // 2]!r} "
            f"and so on, and it has {counted(depth(model), 'layer')}, of which at least one has to be its own."
        )
    return [model.get_parameter(name) for name in names[:border]]
