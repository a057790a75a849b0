"""Language models with a value head, which gives a scalar per token.

    V(s_t) = w · dropout(h_t) + b

`trl.models.value_heads.heads` has three kinds of heads: h_t is the input of the language-model head, or comes from separate
upper layers, or from a separate network. `AutoModelForCausalLMWithValueHead` and `AutoModelForSeq2SeqLMWithValueHead` wrap a
model of `transformers`, with or without adapters: `.pretrained_model` is the model, `.v_head` the head, and all other attributes
are those of the model. The model is saved in the usual format, with the head in a file beside it, so that any library can load
the model from the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import PushToHubMixin

from trl.errors import ConfigError, ModelError
from trl.models.adapters import with_adapters
from trl.models.checkpointing import checkpoint_activations
from trl.models.files import follow_umask
from trl.models.layer_sharing import last_states
from trl.models.load import load_model
from trl.models.patching import evaluating
from trl.models.saved_adapters import hub_options
from trl.models.value_heads.heads import HeadOptions, ValueBranch, ValueHead, ValueModel
from trl.models.value_heads.storage import HEAD_FILE, add_reward_adapter, has_value_model, load_value_model, stored_head


class WithValueHead(nn.Module, PushToHubMixin):
    """A language model (`pretrained_model`) with a `ValueHead` (`v_head`). Other attributes are those of the model."""

    auto_class: ClassVar[Any] = None

    def __init__(
        self,
        pretrained_model: PreTrainedModel | PeftModel,
        *,
        summary_dropout_prob: float = 0.1,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
        num_value_layers: int = 0,
        v_head: ValueHead | None = None,
    ) -> None:
        super().__init__()
        head = pretrained_model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"{type(pretrained_model).__name__} has no language-model head: a value head needs a model that generates."
            )
        self.pretrained_model = pretrained_model
        self.head_options = HeadOptions(summary_dropout_prob, v_head_init_strategy, v_head_initializer_range)
        self.v_head = self._new_head(num_value_layers) if v_head is None else v_head
        self.has_new_adapter = False
        self.reward_adapter_name: str | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pretrained_model":
                raise
            return getattr(self.pretrained_model, name)

    @property
    def is_peft_model(self) -> bool:
        """Whether the model has adapters."""
        return isinstance(self.pretrained_model, PeftModel)

    @is_peft_model.setter
    def is_peft_model(self, value: bool) -> None:
        """Accepts what is so, as scripts of other releases say it. Raises ModelError for anything else."""
        if value is not self.is_peft_model:
            raise ModelError(
                f"is_peft_model={value} cannot be set: the wrapped model is a {type(self.pretrained_model).__name__}."
            )

    def branch(self, layers: int) -> None:
        """Replace the value head by a `ValueBranch` with `layers` own upper layers. Its linear layer is kept."""
        made = self._new_head(layers)
        made.summary = self.v_head.summary
        self.v_head = made

    def _new_head(self, layers: int) -> ValueHead:
        model, options = self.pretrained_model, self.head_options
        made = ValueBranch(model, layers, options) if layers else ValueHead.on(model, options)
        return made.to(next(model.get_output_embeddings().parameters()).device)

    # ---- forward ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        score: Any = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`(logits [B,T,V] float32, loss or None, values [B,T])`, and with `return_past_key_values` the KV cache.

        Arguments are those of the wrapped model. `score` is a `ScoreRequest` of `trl.models.score`.
        """
        kwargs["input_ids"] = input_ids
        if score is not None:
            return self._scored(score, kwargs)
        with self.v_head.states(self.pretrained_model, kwargs) as states:
            output = self.pretrained_model(*args, **{**kwargs, "return_dict": True})
            found = (output.logits.float(), output.loss, self.v_head(states()))
        if not return_past_key_values:
            return found
        return (*found, output["cache" if "cache" in output else "past_key_values"])  # the name depends on the release

    def _scored(self, score: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if "value" not in score.want:
            return self.pretrained_model(**inputs, score=score)
        with self.v_head.states(self.pretrained_model, inputs, score.example) as states:
            found = self.pretrained_model(**inputs, score=score)
            return {**found, "value": self.v_head(score.at(states())).float()}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """Recompute activations in backward: see `transformers.PreTrainedModel`."""
        checkpoint_activations(self.pretrained_model, activation_checkpointing_kwargs, **more)
        self.v_head.checkpoint_activations(activation_checkpointing_kwargs, **more)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample with the wrapped model: see `transformers.GenerationMixin.generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    @torch.no_grad()
    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Rewards `[B,T,labels]` of the reward adapter, on the same base model.

        Raises ModelError without one: pass `reward_adapter=` to `from_pretrained`.
        """
        if self.reward_adapter_name is None:
            raise ModelError(
                "This model has no reward adapter: load it with from_pretrained(..., peft_config=..., "
                "reward_adapter=<folder or name of an adapter trained by RewardTrainer>)."
            )
        with _adapter(self.pretrained_model, self.reward_adapter_name):
            hidden = last_states(self.pretrained_model.get_base_model(), input_ids, attention_mask, **kwargs)
            return self.score(hidden.to(self.score.weight.dtype))

    # ---- loading and saving ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | PreTrainedModel | PeftModel,
        *,
        peft_config: PeftConfig | None = None,
        is_trainable: bool = True,
        reward_adapter: str | None = None,
        reward_adapter_name: str = "reward_adapter",
        summary_dropout_prob: float = 0.1,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
        num_value_layers: int = 0,
        **kwargs: Any,
    ) -> WithValueHead:
        """Make a model with a value head from a name or folder, or from a model object with or without adapters.

        A head that was saved in the folder is loaded, else the head is new. `peft_config` adds a new adapter;
        `is_trainable` says whether an adapter saved in the folder is trained further. `reward_adapter` loads a second adapter
        with the head of a reward model, for `compute_reward_score`. With `num_value_layers`, the value head has a copy of that
        many upper layers. Other `kwargs` go to the model's `from_pretrained`; without `dtype` the model is loaded in float32,
        as by every trainer. The head has the dtype of the model, and at least float32.
        """
        given, hub = pretrained_model_name_or_path, hub_options(kwargs)
        model, head = cls._load(given, is_trainable, kwargs, hub)
        wrapped = cls(
            with_adapters(model, peft_config),
            summary_dropout_prob=summary_dropout_prob,
            v_head_init_strategy=v_head_init_strategy,
            v_head_initializer_range=v_head_initializer_range,
            num_value_layers=num_value_layers,
        )
        wrapped.has_new_adapter = peft_config is not None
        if head is not None:
            wrapped._take_head(str(given), head, hub)
        if reward_adapter is not None:
            wrapped.score = add_reward_adapter(wrapped.pretrained_model, reward_adapter, reward_adapter_name)
            wrapped.reward_adapter_name = reward_adapter_name
        return wrapped

    @classmethod
    def _load(
        cls, given: Any, is_trainable: bool, options: Mapping[str, Any], hub: dict[str, Any]
    ) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Load the model and the state of the head that was saved with it (None without one); a model object is returned."""
        if isinstance(given, str | Path):
            model = load_model(str(given), auto_class=cls.auto_class, trainable=is_trainable, **options)
            return model, stored_head(str(given), hub)
        if options:
            raise ConfigError(
                f"{sorted(options)} are options for loading, but the model is already loaded: leave them out."
            )
        return given, None

    def _take_head(self, name: str, head: dict[str, Tensor], hub: dict[str, Any]) -> None:
        """Load the value head that was saved with the model `name`, as a head of the same kind."""
        if layers := {key.split(".")[1] for key in head if key.startswith("layers.")}:
            self.v_head = self._new_head(len(layers))
        elif has_value_model(name, hub):
            self.v_head = ValueModel(load_value_model(name, hub), self.head_options)
        self.v_head.take(head)

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Save the wrapped model (or its adapters) in the usual format, and the head in a file beside it.

        `state_dict` is that of this module, if weights were gathered beforehand; `kwargs` go to the model's
        `save_pretrained` (`max_shard_size`, …).
        """
        head = self.v_head.state_dict()
        if state_dict is not None:
            head = _below("v_head.", state_dict)
            self.pretrained_model.save_pretrained(
                save_directory, state_dict=_below("pretrained_model.", state_dict), **kwargs
            )
        else:
            self.pretrained_model.save_pretrained(save_directory, **kwargs)
        head = self.v_head.save(Path(save_directory), head, **kwargs)
        if kwargs.get("is_main_process", True):
            tensors = {f"v_head.{name}": value.contiguous().cpu() for name, value in head.items()}
            save_file(tensors, Path(save_directory) / HEAD_FILE, metadata={"format": "pt"})
            follow_umask(save_directory)


class AutoModelForCausalLMWithValueHead(WithValueHead):
    """A causal language model with a value head."""

    auto_class = AutoModelForCausalLM


class AutoModelForSeq2SeqLMWithValueHead(WithValueHead):
    """An encoder-decoder with a value head on its decoder."""

    auto_class = AutoModelForSeq2SeqLM


def value_head_class(config: PreTrainedConfig) -> type[WithValueHead]:
    """The class with a value head for this configuration: that for encoder-decoders or for causal models."""
    return AutoModelForSeq2SeqLMWithValueHead if config.is_encoder_decoder else AutoModelForCausalLMWithValueHead


def with_value_head(model: PreTrainedModel | PeftModel, **options: Any) -> WithValueHead:
    """`model` with a new value head; `options` as in `from_pretrained`."""
    return value_head_class(model.config).from_pretrained(model, **options)


@contextmanager
def _adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Activate another adapter of `model`, in evaluation mode, within the context; `requires_grad` is restored afterwards."""
    active = model.active_adapter
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.set_adapter(name)
    try:
        with evaluating(model):
            yield
    finally:
        model.set_adapter(active)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
