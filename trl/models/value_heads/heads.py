"""Where values come from: a linear head, and the hidden states that it reads.

    V(s_t) = w · dropout(h_t) + b

    ValueHead      h_t is what the policy's language-model head reads
    ValueBranch    upper layers of its own, on what the policy's lower layers give (trlX's value branch)
    ValueModel     a network of its own, of any architecture that reads the same tokens

All are the one module `v_head` of a model with a value head, so they are trained, wrapped and saved with it.
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
"""Arguments of a policy's forward that are about its head or its cache: other networks are not given them."""


@dataclass(frozen=True)
class HeadOptions:
    """Probability of dropout before the linear map, how that starts ("normal", or as `nn.Linear` does), and the spread of a
    normal start."""

    dropout: float = 0.1
    init_strategy: str | None = None
    initializer_range: float = 0.2

    def __post_init__(self) -> None:
        if self.init_strategy not in (None, "normal"):
            raise ConfigError(unknown("v_head_init_strategy", str(self.init_strategy), ["None", "normal"]))

    def linear(self, hidden_size: int, dtype: torch.dtype) -> nn.Linear:
        """A new map from a hidden state to one number, for a model of that type: in float32 where that is less precise."""
        made = nn.Linear(hidden_size, 1, dtype=torch.promote_types(dtype, torch.float32))
        if self.init_strategy == "normal":
            nn.init.normal_(made.weight, mean=0.0, std=self.initializer_range)
            nn.init.zeros_(made.bias)
        return made


class ValueHead(nn.Module):
    """Dropout and a linear map to one number: `[…,H] -> […]`, in the precision of its own weights."""

    def __init__(self, summary: nn.Linear, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.summary = summary

    @classmethod
    def on(cls, model: PreTrainedModel | PeftModel, options: HeadOptions) -> ValueHead:
        """A new head for the states that the language-model head of `model` reads."""
        return cls(_summary(model, options), dropout=options.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.summary.weight.device, self.summary.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(self.dropout(hidden)).squeeze(-1)

    @contextmanager
    def states(
        self, policy: PreTrainedModel | PeftModel, inputs: Mapping[str, Any], example: Tensor | None = None
    ) -> Iterator[Callable[[], Tensor]]:
        """A function that gives the states `[B,T,H]` to read, once `policy(**inputs)` has run meanwhile.

        example   `[N]`, where an encoder-decoder is given each prompt once: which one a completion hangs from
        """
        with reading(policy.get_output_embeddings()) as seen:
            yield lambda: seen[0]

    def checkpoint_activations(self, options: Mapping[str, Any] | None = None, **more: Any) -> None:
        """A linear map keeps nothing that could be computed again."""

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Load what `save` gave."""
        self.load_state_dict(state)

    def save(self, folder: Path, state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """The part of `state` that goes into the head's own file, after writing the rest of it below `folder`."""
        return state


class ValueBranch(ValueHead):
    """A head on a copy of the policy's upper layers. They run on what the policy's lower layers give, to which gradients
    flow, and through its final norm."""

    def __init__(self, policy: PreTrainedModel, layers: int, options: HeadOptions) -> None:
        if isinstance(policy, PeftModel):
            raise ConfigError(
                f"num_value_layers={layers} copies layers to train them whole, but this model trains adapters: leave it "
                "out, or give a value_model."
            )
        stack = layers_of(policy)
        if not 1 <= layers < len(stack):
            raise ConfigError(
                f"num_value_layers={layers}: {type(policy).__name__} has {len(stack)} layers, of which the value can have "
                f"1 to {len(stack) - 1} of its own. For all of them, give a value_model."
            )
        super().__init__(_summary(policy, options), dropout=options.dropout)
        self.start = len(stack) - layers
        kept = {id(config): config for config in configs_of(policy)}  # how layers attend is said in the policy's
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
        """Load what a branch saved, or a head alone."""
        branched = any(name.startswith("layers.") for name in state)
        self.load_state_dict({**({} if branched else self.state_dict()), **state})


class ValueModel(ValueHead):
    """A head on a model without one, whose inputs are the policy's."""

    def __init__(self, model: PreTrainedModel, options: HeadOptions, summary: nn.Linear | None = None) -> None:
        if summary is None:
            summary = options.linear(model.config.get_text_config().hidden_size, model.dtype).to(model.device)
        super().__init__(summary, dropout=options.dropout)
        self.model = model

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, options: HeadOptions | None = None) -> ValueModel:
        """From a sequence classifier with one label, whose head it keeps, or from a language model.

        Raises ModelError for another number of labels, ConfigError for a model with adapters.
        """
        options = options or HeadOptions()
        if isinstance(model, PeftModel):
            raise ConfigError(
                "value_model carries adapters, but it is trained whole: merge them first, value_model.merge_and_unload()."
            )
        summary = dict(model.named_children()).get("score")
        if summary is not None and model.config.num_labels != 1:
            raise ModelError(
                f"value_model gives one number per token, this {type(model).__name__} has {model.config.num_labels}: load "
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
    """A new map from the states that the language-model head of `policy` reads."""
    return options.linear(wrapped_layer(policy.get_output_embeddings()).in_features, policy.dtype)


def _with_idle_head(model: PreTrainedModel) -> PreTrainedModel:
    """An encoder-decoder, whose language-model head stays in place and does nothing (its base model may be itself)."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(False)
    return model


def _read(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None and name not in NOT_READ}


@contextmanager
def reading(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the hidden states that the language-model head is given meanwhile."""
    seen: list[Tensor] = []
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        yield seen
