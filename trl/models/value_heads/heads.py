"""Value heads: a linear head, on one of three kinds of hidden states.

    V(s_t) = w · dropout(h_t) + b

    ValueHead      h_t is the input of the policy's language-model head
    ValueBranch    h_t comes from own upper layers on the policy's lower layers (trlX's value branch)
    ValueModel     h_t comes from a separate network, of any architecture with the same tokens

Each is the single module `v_head` of a model with a value head, so it is trained, wrapped and saved with that model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.errors import ConfigError, ModelError, unknown
from trl.models.adapters import wrapped_layer
from trl.models.checkpointing import checkpoint_activations
from trl.models.files import follow_umask
from trl.models.layer_sharing import last_states, layers_of, recording, resuming
from trl.models.patching import configs_of
from trl.models.value_heads.storage import VALUE_MODEL

NOT_READ = ("score", "labels", "past_key_values", "use_cache", "return_dict", "logits_to_keep", "output_hidden_states")
"""Arguments of a policy's forward that concern its head or KV cache, and are not passed to other networks."""


@dataclass(frozen=True)
class HeadOptions:
    """Dropout probability, initialisation of the linear head ("normal", or None for that of `nn.Linear`), and the standard
    deviation of "normal"."""

    dropout: float = 0.1
    init_strategy: str | None = None
    initializer_range: float = 0.2

    def __post_init__(self) -> None:
        if self.init_strategy not in (None, "normal"):
            raise ConfigError(unknown("v_head_init_strategy", str(self.init_strategy), ["None", "normal"]))

    def linear(self, hidden_size: int, dtype: torch.dtype) -> nn.Linear:
        """A new linear layer from a hidden state to one number, in the dtype of the model, and at least float32."""
        made = nn.Linear(hidden_size, 1, dtype=torch.promote_types(dtype, torch.float32))
        if self.init_strategy == "normal":
            nn.init.normal_(made.weight, mean=0.0, std=self.initializer_range)
            nn.init.zeros_(made.bias)
        return made


class ValueHead(nn.Module):
    """Dropout and a linear layer with one output: `[…,H] -> […]`, computed in the dtype of its own weights."""

    def __init__(self, summary: nn.Linear, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.summary = summary

    @classmethod
    def on(cls, model: PreTrainedModel | PeftModel, options: HeadOptions) -> ValueHead:
        """A new head that reads the same hidden states as the language-model head of `model`."""
        return cls(_summary(model, options), dropout=options.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.summary.weight.device, self.summary.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(self.dropout(hidden)).squeeze(-1)

    @contextmanager
    def states(
        self, policy: PreTrainedModel | PeftModel, inputs: Mapping[str, Any], example: Tensor | None = None
    ) -> Iterator[Callable[[], Tensor]]:
        """Yield a function that returns the hidden states `[B,T,H]`, to be called after `policy(**inputs)` within the context.

        example   `[N]`, if an encoder-decoder reads each prompt once: the index of each completion's prompt
        """
        with reading(policy.get_output_embeddings()) as seen:
            yield lambda: seen[0]

    def checkpoint_activations(self, options: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Do nothing: a linear layer has no activations that could be recomputed."""

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that `save` returned."""
        self.load_state_dict(state)

    def save(self, folder: Path, state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """Return the part of `state` for the head's own file; write the rest, if any, to `folder`."""
        return state


class ValueBranch(ValueHead):
    """A head on a copy of the policy's upper layers, which read the output of the policy's lower layers. The policy's final
    norm follows. Gradients flow into the lower layers."""

    def __init__(self, policy: PreTrainedModel, layers: int, options: HeadOptions) -> None:
        if isinstance(policy, PeftModel):
            raise ConfigError(
                f"num_value_layers={layers} copies layers and trains all of their weights, but this model trains adapters: "
                "leave num_value_layers out, or give a value_model."
            )
        stack = layers_of(policy)
        if not 1 <= layers < len(stack):
            raise ConfigError(
                f"num_value_layers={layers}: {type(policy).__name__} has {len(stack)} layers, so give 1 to {len(stack) - 1}. "
                "For a separate network, give a value_model."
            )
        super().__init__(_summary(policy, options), dropout=options.dropout)
        self.start = len(stack) - layers
        # Copies share the policy's configurations, which set the attention implementation.
        kept = {id(config): config for config in configs_of(policy)}
        self.layers = copy.deepcopy(stack[self.start :], kept)

    @contextmanager
    def states(
        self, policy: PreTrainedModel, inputs: Mapping[str, Any], example: Tensor | None = None
    ) -> Iterator[Callable[[], Tensor]]:
        def upper() -> Tensor:
            with resuming(policy, self.start, lower, self.layers):
                return last_states(policy, **_read(inputs), example=example)

        with recording(policy, self.start) as lower:
            yield upper

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of a branch, or that of a plain head, which leaves the layers unchanged."""
        branched = any(name.startswith("layers.") for name in state)
        self.load_state_dict({**({} if branched else self.state_dict()), **state})


class ValueModel(ValueHead):
    """A head on a separate network, which gets the same inputs as the policy."""

    def __init__(self, model: PreTrainedModel, options: HeadOptions, summary: nn.Linear | None = None) -> None:
        if summary is None:
            summary = options.linear(model.config.get_text_config().hidden_size, model.dtype).to(model.device)
        super().__init__(summary, dropout=options.dropout)
        self.model = model

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, options: HeadOptions | None = None) -> ValueModel:
        """Make a value model from a sequence classifier with one label, keeping its head, or from a language model.

        Raises ModelError for another number of labels, ConfigError for a model with adapters.
        """
        options = options or HeadOptions()
        if isinstance(model, PeftModel):
            raise ConfigError(
                "value_model has adapters, but all of its weights are trained: merge them first, value_model.merge_and_unload()."
            )
        summary = dict(model.named_children()).get("score")
        if summary is not None and model.config.num_labels != 1:
            raise ModelError(
                f"value_model must have one label, but this {type(model).__name__} has {model.config.num_labels}: load "
                "it with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
            )
        if model.config.is_encoder_decoder:
            return cls(_with_idle_head(model), options)
        return cls(model.base_model, options, summary)

    @contextmanager
    def states(
        self, policy: PreTrainedModel | PeftModel, inputs: Mapping[str, Any], example: Tensor | None = None
    ) -> Iterator[Callable[[], Tensor]]:
        yield lambda: last_states(self.model, **_read(inputs), example=example)

    def checkpoint_activations(self, options: Mapping[str, Any] | None = None, **more: Any) -> None:
        checkpoint_activations(self.model, options, **more)

    def take(self, state: Mapping[str, Tensor]) -> None:
        if "summary.bias" not in state:
            self.summary.register_parameter("bias", None)
        self.summary.load_state_dict({name.removeprefix("summary."): value for name, value in state.items()})

    def save(self, folder: Path, state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        self.model.save_pretrained(folder / VALUE_MODEL, state_dict=weights, **options)
        follow_umask(folder / VALUE_MODEL)
        return {name: value for name, value in state.items() if name.startswith("summary.")}


def _summary(policy: PreTrainedModel | PeftModel, options: HeadOptions) -> nn.Linear:
    """A new linear layer for the inputs of the language-model head of `policy`."""
    return options.linear(wrapped_layer(policy.get_output_embeddings()).in_features, policy.dtype)


def _with_idle_head(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze the unused head of an encoder-decoder. It cannot be dropped: the base model may be the model itself."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(False)
    return model


def _read(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None and name not in NOT_READ}


@contextmanager
def reading(head: nn.Module) -> Iterator[list[Tensor]]:
    """Record the inputs of the language-model head within the context."""
    seen: list[Tensor] = []
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        yield seen
