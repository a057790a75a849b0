"""Language models with the heads of ILQL: for every state a value, and Q-values for the whole vocabulary.

    V(s_t)      = W₂ ReLU(W₁ h_t + b₁) + b₂                     one number
    Q_i(s_t, ·) = the same with V outputs, one per token;        i = 1, 2, each with a target network Q'_i

h_t is the input of the language-model head. Training needs only Q of the action taken, and its log-softmax, so `[M,V]` Q-values
are never stored; sampling computes all Q-values, for one position at a time. See `trl.algorithms.ilql`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from trl.algorithms.ilql import polyak_update
from trl.errors import ConfigError, ModelError
from trl.models.adapters import with_adapters
from trl.models.load import load_config
from trl.models.saved_adapters import hub_options
from trl.models.sharding import shards
from trl.models.value_heads.auto_models import WithValueHead
from trl.models.value_heads.heads import ValueHead
from trl.ops.logprobs import logprobs_from_linear


class ActionValues(nn.Linear):
    """A linear layer with one value per action, `[…,H] -> […,V]`, which can be computed for the actions taken only."""

    def forward(self, hidden: Tensor, action: Tensor | None = None, *, normalized: bool = False) -> Any:
        """Q `[M,V]`; with `action [M]` the pair of Q(a) `[M]` and, if `normalized`, log softmax(Q)[a] `[M]` (else None)."""
        if action is None:
            return super().forward(hidden)
        chosen = (hidden * self.weight[action]).sum(-1) + self.bias[action]
        if not normalized:
            return chosen, None
        return chosen, logprobs_from_linear(hidden, self.weight, self.bias, action)["logprobs"]


class QHead(nn.Module):
    """A Q head with one hidden layer of width 2H."""

    def __init__(self, hidden_size: int, vocabulary: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.actions = ActionValues(2 * hidden_size, vocabulary)

    def forward(self, hidden: Tensor, *action: Tensor, **options: Any) -> Any:
        return self.actions(self.inner(hidden).relu(), *action, **options)


class ILQLHeads(ValueHead):
    """V, the Q heads and their target networks, in float32. Its forward is that of a `ValueHead`, and returns V."""

    def __init__(self, hidden_size: int, vocabulary: int, *, two_qs: bool = True) -> None:
        summary = nn.Linear(2 * hidden_size, 1)
        super().__init__(summary, dropout=0.0)
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.qs = nn.ModuleList(QHead(hidden_size, vocabulary) for _ in range(2 if two_qs else 1))
        self.target_qs = copy.deepcopy(self.qs).requires_grad_(False)

    @classmethod
    def on(cls, model: PreTrainedModel | PeftModel, *, two_qs: bool = True) -> ILQLHeads:
        """New heads that read the same hidden states as the language-model head of `model`."""
        head = model.get_output_embeddings()
        made = cls(head.in_features, head.out_features, two_qs=two_qs)
        return made.to(next(head.parameters()).device)

    def forward(self, hidden: Tensor) -> Tensor:
        """V `[…]` of states `[…,H]`."""
        hidden = self._read(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(self.inner(hidden).relu()).squeeze(-1)

    def taken(self, hidden: Tensor, action: Tensor) -> dict[str, Tensor]:
        """For actions `[M]` in states `[M,H]`: `q_i` and `q_logprobs_i` of each Q head, and `target_q` = min_i Q'_i;
        `[M]` each."""
        hidden, found = self._read(hidden), {}
        with torch.autocast(hidden.device.type, enabled=False):
            for i, q in enumerate(self.qs):
                found[f"q_{i}"], found[f"q_logprobs_{i}"] = q(hidden, action, normalized=True)
            with torch.no_grad():
                targets = [q(hidden, action)[0] for q in self.target_qs]
        return {**found, "target_q": torch.stack(targets).amin(0)}

    @torch.no_grad()
    def action_values(self, hidden: Tensor) -> Tensor:
        """min_i Q'_i(s, ·) `[B,V]` of states `[B,H]`."""
        hidden = self._read(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.stack([q(hidden) for q in self.target_qs]).amin(0)

    def _read(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.summary.weight.device, self.summary.weight.dtype)


class WithILQLHeads(WithValueHead):
    """A language model (`pretrained_model`) with `ILQLHeads` (`v_head`). Other attributes are those of the model."""

    v_head: ILQLHeads

    def __init__(self, pretrained_model: PreTrainedModel | PeftModel, *, two_qs: bool = True) -> None:
        super().__init__(pretrained_model, v_head=ILQLHeads.on(pretrained_model, two_qs=two_qs))

    def sync_targets(self, alpha: float) -> None:
        """θ' ← α θ + (1 − α) θ' for the target networks; each process updates its own shards."""
        held = shards(self)
        target, source = (
            [tensor for name, tensor in held.items() if name.startswith(f"v_head.{part}.")]
            for part in ("target_qs", "qs")
        )
        polyak_update(target, source, alpha=alpha)

    def branch(self, layers: int) -> None:
        """Raises ConfigError: these heads read the inputs of the language-model head."""
        raise ConfigError(f"num_value_layers={layers}: ILQL does not support separate value layers, leave it out.")

    def _scored(self, score: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if "q" not in score.want:
            return super()._scored(score, inputs)
        with self.v_head.states(self.pretrained_model, inputs, score.example) as states:
            found = self.pretrained_model(**inputs, score=score)
            hidden = score.at(states())
            return {**found, "value": self.v_head(hidden).float(), **self.v_head.taken(hidden, score.target)}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | PreTrainedModel | PeftModel,
        *,
        peft_config: PeftConfig | None = None,
        is_trainable: bool = True,
        two_qs: bool = True,
        **kwargs: Any,
    ) -> WithILQLHeads:
        """Make a model with ILQL heads from a name or folder, or from a model object with or without adapters.

        Heads that were saved in the folder are loaded, else they are new. `peft_config` adds a new adapter; `is_trainable`
        says whether an adapter saved in the folder is trained further. Other `kwargs` go to the model's `from_pretrained`.
        Raises ModelError for a folder with the value head of another method.
        """
        given, hub = pretrained_model_name_or_path, hub_options(kwargs)
        model, state = cls._load(given, is_trainable, kwargs, hub)
        stored_qs = None if state is None else _number_of_qs(state, str(given))
        wrapped = cls(with_adapters(model, peft_config), two_qs=two_qs if stored_qs is None else stored_qs == 2)
        wrapped.has_new_adapter = peft_config is not None
        if state is not None:
            wrapped.v_head.load_state_dict(state)
        return wrapped


def _number_of_qs(state: Mapping[str, Tensor], name: str) -> int:
    qs = {key.split(".")[1] for key in state if key.startswith("qs.")}
    if not qs:
        raise ModelError(
            f"{name!r} was saved with a value head but without Q heads, by another method than ILQL: give the folder of a "
            "language model without a value head."
        )
    return len(qs)


class AutoModelForCausalLMWithILQLHeads(WithILQLHeads):
    """A causal language model with the heads of ILQL."""

    auto_class = AutoModelForCausalLM


class AutoModelForSeq2SeqLMWithILQLHeads(WithILQLHeads):
    """An encoder-decoder with the heads of ILQL on its decoder."""

    auto_class = AutoModelForSeq2SeqLM


KINDS = {False: AutoModelForCausalLMWithILQLHeads, True: AutoModelForSeq2SeqLMWithILQLHeads}
"""Whether the model is an encoder-decoder → class."""


def with_ilql_heads(model: PreTrainedModel | PeftModel, **options: Any) -> WithILQLHeads:
    """`model` with new ILQL heads; `options` as in `from_pretrained`."""
    return KINDS[model.config.is_encoder_decoder].from_pretrained(model, **options)


def load_with_ilql_heads(name: str, **options: Any) -> WithILQLHeads:
    """Load the model `name` with its saved ILQL heads, or with new ones; `options` as in `from_pretrained`."""
    config = load_config(name, trust_remote_code=options.get("trust_remote_code", False), **hub_options(options))
    return KINDS[config.is_encoder_decoder].from_pretrained(name, **options)
