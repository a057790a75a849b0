"""Run lower layers that several models share once, and the upper layers of each model on their output.

    h_s = lower(x),     h = upper(h_s),     h' = upper'(h_s)

The policy, a reference that shares its lower layers, and a value branch differ only in their upper layers. The output of the
lower layers is recorded in the policy's forward. The second model then runs its whole forward, in which the lower layers return
the recorded output at once. So masks, position embeddings and other arguments of the layers come from the
architecture's own code.
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
    """Pattern of the names of the model's layers, such as "model.layers.{layer}"; of the decoder if there are two stacks."""
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth(model)]
    if not stacks:
        raise ModelError(
            f"The layers of this {type(model).__name__} were not found: give the pattern of their names, for example "
            "pattern='model.layers.{layer}'."
        )
    shallowest = min(name.count(".") for name in stacks)
    return [name for name in stacks if name.count(".") == shallowest][-1] + ".{layer}"


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The model's layers from bottom to top; those of the decoder if there are two stacks."""
    return model.get_submodule(layer_pattern(model).removesuffix(".{layer}"))


def _encoder(model: PreTrainedModel) -> list[nn.Module]:
    return [model.get_encoder()] if model.config.is_encoder_decoder else []


@contextmanager
def recording(model: PreTrainedModel, start: int) -> Iterator[list[Any]]:
    """Record the inputs of layer `start` in the next forward: the output of the layer below, after that of an encoder if any."""
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
    """Make forwards of `model` start at layer `start` within the context: modules below return their output in `given`.

    `upper` are layers to run in place of the model's own upper layers.
    """
    layers = layers_of(model)
    forwards: dict[nn.Module, Callable] = {layer: _returning(given[-1]) for layer in layers[:start]}
    forwards |= {encoder: _returning(given[0]) for encoder in _encoder(model)}
    if upper is not None:
        forwards |= {layer: other.__call__ for layer, other in zip(layers[start:], upper, strict=True)}
    with without_graphs(model), replaced_forwards(forwards):
        yield


def _returning(output: Any) -> Callable:
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
    """Last hidden states `[B,T,H]` without the head; of the decoder in an encoder-decoder (for `example` see `encoded`)."""
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
    """Hidden states and mask of the encoder. With `example [N]`, each prompt is encoded once and repeated by these indices."""
    hidden = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if example is None:
        return hidden, attention_mask
    return hidden.index_select(0, example), attention_mask.index_select(0, example)
