"""The load-balancing loss of a mixture of experts, over all tokens of an optimizer step.

    L = c · E Σ_e f_e P_e        f_e = Σ_t w_t [e is among the top k of t] / W        P_e = Σ_t w_t p_te / W

Switch Transformers (arXiv:2101.03961, equations 4 to 6), as `transformers` computes it: t runs over the tokens of all
layers with experts, without padding, and W = Σ w_t. The weight w_t is the number of rows of the padded layout that a
position stands for: 1, or the number of completions for a token of a shared prompt.

f has no gradient, and L is linear in P. So if f is that of the whole step, the sum of L over micro-batches equals L of one
pass over all rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.errors import ConfigError
from trl.types import Batch

FUNCTION = "load_balancing_loss_func"
"""Name of the function in a modeling file of `transformers` that computes the load-balancing loss."""

OPTION = "router_aux_loss_coef"


@dataclass(frozen=True)
class Load:
    """How many tokens each expert received: `counts [E]` = Σ w_t [e is among the top k], and W; both summed over layers."""

    counts: Tensor
    weight: Tensor

    @property
    def f(self) -> Tensor:
        return self.counts / self.weight.clamp(min=1)


class RouterLoss:
    """Records router logits of `model` by forward hooks, and computes the loss; `coefficient` is its weight c."""

    def __init__(self, model: PreTrainedModel, coefficient: float) -> None:
        router, self._index = _recorder(model)
        self.coefficient = coefficient
        self.top_k: int = model.config.get_text_config().num_experts_per_tok
        self._seen: list[Tensor] | None = None
        self._keeps_gradient = True
        _check_formula(model, self.top_k)
        layers = [module for module in model.modules() if isinstance(module, router)]
        if not layers:
            raise ConfigError(_refusal(model, coefficient, "it has no layer with experts"))
        for layer in layers:
            layer.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        # Ignores passes of another kind: a reference that is this model without its adapter runs without gradient.
        if self._seen is not None and torch.is_grad_enabled() == self._keeps_gradient:
            logits = output[self._index] if isinstance(output, tuple) else output
            self._seen.append(logits)

    @contextmanager
    def recording(self, *, keeps_gradient: bool = True) -> Iterator[list[Tensor]]:
        """Collect the logits `[B·T,E]` of each layer's router within the context.

        Only forward passes with gradient are recorded if `keeps_gradient`, else only those without.
        """
        self._seen, self._keeps_gradient = [], keeps_gradient
        try:
            yield self._seen
        finally:
            self._seen = None

    def load(self, logits: Sequence[Tensor], batch: Batch) -> Load:
        """The `Load` of the tokens of `batch`, over all layers."""
        weights = _weights(batch)
        counts = torch.zeros(logits[0].shape[-1], device=weights.device)
        for layer in logits:
            chosen = layer.detach().flatten(0, -2).float().topk(self.top_k, dim=-1).indices
            counts.index_add_(0, chosen.flatten(), weights.repeat_interleave(self.top_k))
        return Load(counts, weights.sum() * len(logits))

    def loss(self, logits: Sequence[Tensor], batch: Batch, load: Load) -> Tensor:
        """The part of E Σ_e f_e P_e from the tokens of `batch`, where `load` is that of the whole step. Without the weight c."""
        weights = _weights(batch)
        chances = torch.stack([weights @ layer.flatten(0, -2).float().softmax(-1) for layer in logits]).sum(0)
        return len(chances) * (load.f * chances).sum() / load.weight.clamp(min=1)


def router_loss_of(model: PreTrainedModel, coefficient: float | None) -> RouterLoss | None:
    """The load-balancing loss with weight `coefficient`, or if that is None, as the model's configuration says.

    None if the weight is 0, or `coefficient` is None and `output_router_logits` is not set. Raises ConfigError with the
    reason if the model has no routers, or computes another loss.
    """
    config = model.config.get_text_config().to_dict()
    if coefficient is None:
        asked = config.get("output_router_logits") or model.config.to_dict().get("output_router_logits")
        coefficient = config.get(OPTION, 0.0) if asked else 0.0
    return RouterLoss(model, coefficient) if coefficient else None


def _recorder(model: PreTrainedModel) -> tuple[type[nn.Module], int]:
    """The class of the model's routers, and the index of the logits in their output."""
    known = (module._can_record_outputs for module in model.modules() if isinstance(module, PreTrainedModel))
    found = next((each["router_logits"] for each in known if each and "router_logits" in each), None)
    if found is None or isinstance(found, (list, type)):
        raise ConfigError(_refusal(model, None, "it is not a mixture of experts, or its routers cannot be found"))
    return found.target_class, found.index


def _check_formula(model: PreTrainedModel, top_k: int) -> None:
    """Raises ConfigError if the loss in the model's modeling file gives other numbers than that of this file."""
    function = vars(sys.modules[type(model).__module__]).get(FUNCTION)
    logits = torch.linspace(-2, 2, 6 * max(4, 2 * top_k)).sin().view(6, -1)
    if function is None:
        raise ConfigError(_refusal(model, None, "its architecture has no load-balancing loss"))
    expected = function((logits, logits.flip(0)), logits.shape[1], top_k, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    probabilities = logits.softmax(-1)
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0])
    layers = (probabilities, probabilities.flip(0))
    chosen = (torch.zeros_like(each).scatter(1, each.topk(top_k, dim=-1).indices, 1.0) for each in layers)
    share = sum(weights @ each for each in chosen) / 10
    mean = sum(weights @ each for each in layers) / 10
    if not torch.allclose(torch.as_tensor(expected), logits.shape[1] * (share * mean).sum(), atol=1e-5):
        raise ConfigError(_refusal(model, None, "its load-balancing loss is not that of Switch Transformers"))


def _refusal(model: PreTrainedModel, coefficient: float | None, why: str) -> str:
    given = OPTION if coefficient is None else f"{OPTION}={coefficient}"
    return (
        f"{given}: the load-balancing loss of {type(model).__name__} is not available, since {why}. Leave {OPTION} out, or set "
        "output_router_logits=False in the model's configuration (model_init_kwargs)."
    )


def _weights(batch: Batch) -> Tensor:
    """w `[B·T]`: how many rows of the padded layout each position stands for; all 0 in a dummy batch without tokens."""
    return batch.copies.flatten().float() * bool(batch.tokens)
