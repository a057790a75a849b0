"""Lower layers run once, upper layers run as often as there are sets of them.

    h_s = lower(x),     h = upper(h_s),     h' = upper'(h_s)

The policy, a reference with which it shares its lower layers, and a value branch differ in their upper layers alone. What
the lower ones gave in the policy's forward is recorded, and the same forward is run again with that in their place, so that
masks, positions and what else an architecture hands to its layers are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.errors import ModelError
from trl.models.graphs import without_graphs
from trl.models.patching import replaced_forwards


def depth(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def layer_pattern(model: PreTrainedModel) -> str:
    """How the model's layers are named, as in "model.layers.{layer}"; those of the decoder if there are two stacks."""
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth(model)]
    if not stacks:
        raise ModelError(
            f"The layers of this {type(model).__name__} were not found: name them, as in pattern='model.layers.{{layer}}'."
        )
    shallowest = min(name.count(".") for name in stacks)
    return [name for name in stacks if name.count(".") == shallowest][-1] + ".{layer}"


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The model's layers, from the lowest; the decoder's if there are two stacks."""
    return model.get_submodule(layer_pattern(model).removesuffix(".{layer}"))


def _encoder(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_encoder()] if model.config.is_encoder_decoder else []


@contextmanager
def recording(model: PreTrainedModel, start: int) -> Iterator[list[Any]]:
    """Collect what is given meanwhile to layer `start` and those above: by the layer below, and by the encoder before it."""
    modules = [*_encoder(model), layers_of(model)[start - 1]]
    given: list[Any] = [None] * len(modules)
    with ExitStack() as hooks:
        for i, module in enumerate(modules):
            hooks.enter_context(
                module.register_forward_hook(lambda module, args, output, i=i: given.__setitem__(i, output))
            )
        yield given


@contextmanager
def resuming(
    model: PreTrainedModel, start: int, given: Sequence[Any], upper: Sequence[nn.Module] | None = None
) -> Iterator[None]:
    """Meanwhile, forwards of `model` begin at layer `start`: what is below gives what was recorded. `upper` are other
    layers to run in place of its own."""
    layers = layers_of(model)
    instead: dict[nn.Module, Callable] = {layer: _giving(given[-1]) for layer in layers[:start]}
    instead |= {encoder: _giving(given[0]) for encoder in _encoder(model)}
    if upper is not None:
        instead |= {layer: other.__call__ for layer, other in zip(layers[start:], upper, strict=True)}
    with without_graphs(model), replaced_forwards(instead):
        yield


def _giving(output: Any) -> Callable:
    return lambda *args, **kwargs: output


def last_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    *,
    example: Tensor | None = None,
    **positions: Any,
) -> Tensor:
    """Last hidden states `[B,T,H]`, without a head; of the decoder in an encoder-decoder, with `example` as in `encoded`."""
    if not model.config.is_encoder_decoder:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **positions}
        return model.base_model(**inputs, use_cache=False).last_hidden_state
    prompts, mask = encoded(model, example, input_ids, attention_mask)
    return model.get_decoder()(
        input_ids=decoder_input_ids,
        attention_mask=decoder_attention_mask,
        encoder_hidden_states=prompts,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state


def encoded(
    model: PreTrainedModel, example: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """States and mask of the encoder, which reads each prompt once; repeated by `example` `[N]`, if that is given."""
    hidden = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if example is None:
        return hidden, attention_mask
    return hidden.index_select(0, example), attention_mask.index_select(0, example)
