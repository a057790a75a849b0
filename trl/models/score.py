"""`score`: log-probabilities of the completions of a batch under a model.

    logprobs[n,t] = log π(target[n,t] | prompt, target[n,<t])

Only hidden states that predict a scored token reach the language-model head, and they reach it in chunks, so `[B,T,V]`
logits never exist. Everything runs inside the model's own forward and the head's own forward, where DDP, FSDP2 and
ZeRO-3 gather weights as usual:

    model(**inputs, score=request)
      └ the architecture's forward, whose head only records the hidden states it is given
      └ head(None, request with hidden[request.index])   → log-probabilities

What the architecture does to logits after the head (soft-capping, scaling) is read from its configuration, and verified
once per model by passing known values through it. A model that does something else is scored from its full logits, which
is correct but slower, with one warning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from trl.errors import ModelError
from trl.models.adapters import wrapped_layer
from trl.models.attention import layer_masks
from trl.models.layer_sharing import encoded
from trl.models.patching import evaluating, is_patched, patch_forward, replaced_forwards, with_self
from trl.models.rotary import rotate_by_own_length
from trl.models.sharding import is_whole
from trl.models.value_heads.auto_models import WithValueHead
from trl.models.varlen import VARLEN, no_mask
from trl.ops.logits import STATISTICS, LogitTransform
from trl.ops.logprobs import (
    logprobs_from_linear,
    logprobs_from_logits,
    logprobs_from_module,
)
from trl.types import Batch, Scores
from trl.vision.blank import read_blank
from trl.vision.encoder_outputs import with_encoder_outputs


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a forward pass has to score: M positions of the grid (`index`), their tokens (`target`), and statistics (`want`)."""

    index: Tensor
    target: Tensor
    want: frozenset[str]
    temperature: float
    positions: int
    """T of the grid, without virtual tokens that a prompt adapter prepends."""
    example: Tensor | None = None
    """`[N]`, encoder-decoders only: the index of each completion's prompt."""
    hidden: Callable[[], Tensor] | None = None
    """Returns the hidden states `[M,H]` for the head to score. It is a function because FSDP2 searches arguments for tensors:
    it would take the gradient of this one as the end of backward for the whole group of weights that is gathered with the head,
    although the norm before the head still needs them."""

    def at(self, grid: Tensor) -> Tensor:
        """Entries `[M,…]` of a grid `[B,T,…]` at the scored positions."""
        return grid[:, -self.positions :].flatten(0, 1).index_select(0, self.index)


def score(model: nn.Module, batch: Batch, *, temperature: float = 1.0, want: Collection[str] = ()) -> Scores:
    """Log-probabilities `[N,C]` float32 of the batch's completions, and the statistics named in `want`.

    `model` is a causal or encoder-decoder language model, wrapped or not (DDP, FSDP2, ZeRO, adapters, a value head).
    `want` contains any of "entropy", "mean_logprob", "mean_logit", "collision", "greedy", "value": see `Scores`. Gradients
    flow if autograd is enabled. Raises ModelError for "value" without a value head.
    """
    found = _score(model, batch, temperature=temperature, want=want)
    tables = {name: _scatter(values, batch) for name, values in found.items()}
    extras = {name: tables.pop(name) for name in [*tables] if name not in Scores.__slots__}
    return Scores(**tables, extras=extras)


def score_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits `[M,V]` float32 that predict the scored tokens, for losses that need whole distributions."""
    return _score(model, batch, temperature=1.0, want=("logits",))["logits"]


def _score(model: nn.Module, batch: Batch, *, temperature: float, want: Collection[str]) -> dict[str, Tensor]:
    inner = unwrap(model)
    if "value" in want and not isinstance(without_wrapper(model), WithValueHead):
        raise ModelError(
            f"This {type(inner).__name__} has no value head: add one with trl.models.value_heads.auto_models.with_value_head."
        )
    prepare_scoring(inner)
    request = ScoreRequest(
        index=batch.predictor.flatten()[batch.scored],
        target=batch.target.flatten()[batch.scored],
        want=frozenset(want),
        temperature=temperature,
        positions=batch.inputs.get("decoder_input_ids", batch.inputs["input_ids"]).shape[1],
        example=batch.example if inner.config.is_encoder_decoder else None,
    )
    return model(**with_encoder_outputs(batch.inputs), **segment_attention(inner, batch), score=request)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model inside DDP, a DeepSpeed engine, `torch.compile`, a value head's model and adapters."""
    inner = without_wrapper(model)
    inner = inner.pretrained_model if isinstance(inner, WithValueHead) else inner
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def without_wrapper(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of DDP, DeepSpeed or `torch.compile`.

    DDP is unwrapped here, and accelerate is called for other wrappers only: it checks on each call which packages are installed.
    """
    while isinstance(model, DistributedDataParallel):
        model = model.module
    if isinstance(model, (PreTrainedModel, PeftModel, WithValueHead)):
        return model
    return extract_model_from_parallel(model, keep_fp32_wrapper=True)


def networks_of(model: nn.Module) -> list[PreTrainedModel]:
    """The models of `transformers` in a module that is trained: the policy, and after it a value network, if there is one."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [network for part in model.children() for network in networks_of(part)]


def prepare_scoring(model: PreTrainedModel) -> None:
    """Patch the forward of `model` to take the keyword `score`. A second call has no effect.

    Call it after adapters are added and before the model is wrapped for distributed training.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language-model head to score tokens with.")
    if is_patched(head):
        return
    rotate_by_own_length(model)
    if not is_patched(model):
        patch_forward(model, _accepting_score(model.forward))
    head._trl_recorded = None
    head._trl_transform = None
    patch_forward(head, _head_forward)
    transform = _configured_transform(model)
    if not is_whole(model) or _transforms_logits_by(model, head, transform):
        head._trl_transform = transform
    else:
        warnings.warn(
            f"{type(model).__name__} changes its logits after the head by more than the scaling and soft-capping in its "
            "configuration: it is scored from its full logits, which is slower and takes more memory.",
            stacklevel=3,
        )


def _accepting_score(plain: Callable) -> Callable:
    """A forward with the keyword `score`, and otherwise the signature of `plain`, which `transformers` inspects."""

    def forward(self: PreTrainedModel, *args: Any, score: ScoreRequest | None = None, **kwargs: Any) -> Any:
        if score is None:
            return self._trl_plain_forward(*args, **kwargs)
        if vars(self.config).get("output_router_logits"):  # see `trl.models.router_loss`
            kwargs["output_router_logits"] = False
        if score.example is not None:
            kwargs = _encoded(self, score.example, **kwargs)
        head = self.get_output_embeddings()
        kwargs, blank = read_blank(self, kwargs)
        if head._trl_transform is None:
            return _from_plain_logits(score.at(self._trl_plain_forward(*args, **kwargs).logits) + blank(), score)
        hidden = score.at(_hidden_states(self, head, *args, **kwargs)) + blank()
        return head(None, replace(score, hidden=lambda: hidden))

    return with_self(functools.update_wrapper(forward, plain), plain)


def _head_forward(self: nn.Module, hidden: Tensor | None, score: ScoreRequest | None = None) -> Any:
    """The head's forward: with `score` its statistics; else logits, or a single one while hidden states are recorded."""
    if score is not None:
        return _head_statistics(self, score)
    if self._trl_recorded is None:
        return self._trl_plain_forward(hidden)
    self._trl_recorded.append(hidden)
    return hidden.new_zeros(*hidden.shape[:-2], 1, 1)  # not empty, of which `debug` finds no minimum


def _hidden_states(model: PreTrainedModel, head: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Hidden states `[B,T,H]`, the input of the language-model head."""
    recorded: list[Tensor] = []
    head._trl_recorded = recorded
    try:
        model._trl_plain_forward(*args, **kwargs, use_cache=False)
    finally:
        head._trl_recorded = None
    return recorded[0]


def _head_statistics(head: nn.Module, request: ScoreRequest) -> dict[str, Tensor]:
    known, hidden = head._trl_transform, request.hidden()
    transform = LogitTransform(known.scale, known.softcap, request.temperature)
    if "logits" in request.want:
        return {"logits": transform(head._trl_plain_forward(hidden).float())}
    if _is_plain_linear(head):
        return logprobs_from_linear(
            hidden, head.weight, head.bias, request.target, want=request.want, transform=transform
        )
    forward, vocabulary = head._trl_plain_forward, wrapped_layer(head).out_features
    return logprobs_from_module(
        forward, hidden, request.target, vocabulary=vocabulary, want=request.want, transform=transform
    )


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether the head is an `nn.Linear`, also as a subclass that FSDP2 makes, or with a fake weight of the memory estimate."""
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    return linear and type(head.weight) in (nn.Parameter, Tensor, FakeTensor)


def _from_plain_logits(logits: Tensor, request: ScoreRequest) -> dict[str, Tensor]:
    transform = LogitTransform(temperature=request.temperature)
    if "logits" in request.want:
        return {"logits": transform(logits.float())}
    return logprobs_from_logits(logits, request.target, want=request.want, transform=transform)


def _encoded(
    model: PreTrainedModel, example: Tensor, *, input_ids: Tensor, attention_mask: Tensor, **decoder: Any
) -> dict[str, Any]:
    """Run the encoder once per prompt; return the arguments of the encoder-decoder's forward with its output."""
    hidden, mask = encoded(model, example, input_ids, attention_mask)
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask, **decoder}


def segment_attention(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Keyword arguments that restrict attention: the spans, or the mask of the shared layout; empty for other batches."""
    if batch.spans is not None and model.config._attn_implementation == VARLEN:
        return {"attention_mask": no_mask(batch.mask.device), "spans": batch.spans}
    if batch.segments is None:
        return {}
    return {"attention_mask": layer_masks(model.config, batch.segments, model.dtype, batch.inputs)}


def _scatter(values: Tensor, batch: Batch) -> Tensor:
    """Put the values `[M]` of scored tokens into a table `[N,C]`, zero elsewhere."""
    table = values.new_zeros(batch.mask.numel())
    return table.index_copy(0, batch.scored, values).view_as(batch.mask)


def _configured_transform(model: PreTrainedModel) -> LogitTransform:
    """The transform of logits in the configuration: `final_logit_softcapping`, `logit_scale`, `logits_scaling`, …"""
    config = model.config.get_text_config().to_dict()
    scale = config.get("logit_scale") or config.get("lm_head_multiplier") or 1.0
    scale /= config.get("logits_scaling") or 1.0
    return LogitTransform(scale=scale, softcap=config.get("final_logit_softcapping"))


@torch.no_grad()
def _transforms_logits_by(model: PreTrainedModel, head: nn.Module, transform: LogitTransform) -> bool:
    """Whether `model` applies exactly `transform` to the output of its head.

    For the test the head returns a ramp from −50 to 50 in place of logits, for two tokens.
    """
    vocabulary = wrapped_layer(head).out_features
    weight = next(p for p in head.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.get_default_dtype()
    ramp = torch.linspace(-50, 50, vocabulary, device=weight.device, dtype=dtype).expand(1, 2, vocabulary)
    ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with evaluating(model), replaced_forwards({head: lambda hidden: ramp}):
        logits = model._trl_plain_forward(**inputs, use_cache=False).logits
    return torch.allclose(logits.float(), transform(ramp.float()), rtol=2e-2, atol=1e-2)


assert set(STATISTICS) < set(Scores.__slots__)
