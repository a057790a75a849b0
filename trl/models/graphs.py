"""A model's layers as CUDA graphs: forward and backward of a micro-batch are one launch each, however many kernels they have.

The host needs 5 to 70 µs to launch a kernel, and a layer has some seventy of them, forward and backward: below
`LAUNCH_BOUND_FLOPS` the device waits for the host. A captured graph is one launch, which reads and writes fixed addresses:

    inputs      are copied into static tensors. Batches are padded to few shapes (`trl.data.layout`)
    output      hidden states `[B,T,H]`, which heads read; backward copies their gradient into a static tensor
    gradients   of weights are added to buffers, which are the weights' `grad` from then on; those of inputs are returned

What is captured is the forward of the model's decoder: the embeddings of tokens and the layers, or the layers alone if they
are given embeddings with image features in them. Image encoders and heads run as usual.

The first input shape runs eagerly the first time. The second time it is captured and checked: hidden states and gradients
must equal those of the eager layers. Further shapes are captured when they are first seen. A shape that is larger than all
before it discards the other graphs, which are then captured again in its memory. Layers that cannot be captured (those that
copy a number to the host in between, as some mixtures of experts do) run eagerly, with one warning; so do layers that have hooks.
Batches without `Spans` run eagerly as well: padded rows, and sampling.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.models.captured import Captured, Gradients, Inputs, Record, Run, grid_of, tensors_of
from trl.models.compiled import repeated_layers
from trl.models.patching import is_patched, patch_forward, with_self
from trl.ops.capture import capture
from trl.types import Spans

logger = logging.getLogger(__name__)

LAUNCH_BOUND_FLOPS = 2e12
"""Floating-point operations of a layer, forward and backward, below which launching its kernels takes longer than computing:
5 ms at 400 TFLOP/s, or seventy launches of 70 µs."""
MAX_GRAPHS = 24
"""Graphs that a model holds, with backward and without; further shapes run eagerly."""
REQUIRES_GRAD = "make_inputs_require_grads"
"""Name of the hook by which `transformers` lets embeddings require gradients, for adapters and checkpointed layers."""


def captures(model: PreTrainedModel, positions: int) -> bool:
    """Whether batches with this number of positions run as graphs, since launching a layer takes longer than computing it."""
    graphs = graphs_of(model)
    return graphs is not None and positions < graphs.max_positions


def graphs_of(model: PreTrainedModel) -> Graphs | None:
    """The graphs of the model's layers; None if they are not captured."""
    return vars(model.get_decoder()).get("_trl_graphs")


def capture_layers(model: PreTrainedModel, record: Record | None = None) -> None:
    """Run the layers of `model` as graphs, made by `record` (default: CUDA graphs)."""
    decoder = model.get_decoder()
    if not is_patched(decoder):
        patch_forward(decoder, _replaying(decoder.forward))
    elif "_trl_graphs" not in vars(decoder):  # patched by whoever reads its head
        logger.warning(f"{type(model).__name__} runs without CUDA graphs: its layers are not apart from its head.")
        return
    decoder._trl_graphs = Graphs(decoder, record or cuda_graph)


def release(model: PreTrainedModel, *, for_good: bool) -> None:
    """Free the graphs of a model and their memory; with `for_good`, no more are captured."""
    if (graphs := graphs_of(model)) is None:
        return
    graphs.forget()
    if for_good:
        model.get_decoder()._trl_graphs = None


def capture_as(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Capture the layers of `model`, which reads the policy's batches, if those of the policy are captured."""
    if (graphs := graphs_of(policy)) is not None:
        capture_layers(model, graphs.record)


def _replaying(plain: Callable) -> Callable:
    """The forward of a decoder that replays a graph where there is one, with the signature of `plain`."""
    names = [*inspect.signature(plain).parameters]

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        graphs: Graphs | None = self._trl_graphs
        if graphs is None or not isinstance(kwargs.get("spans"), Spans):
            return self._trl_plain_forward(*args, **kwargs)
        return graphs(self._trl_plain_forward, dict(zip(names, args, strict=False)) | kwargs)

    return with_self(functools.update_wrapper(forward, plain), plain)


@contextmanager
def without_graphs(*models: PreTrainedModel) -> Iterator[None]:
    """Run the models eagerly within the context, so that `torch.autograd.grad` sees the weights, which replays hide."""
    held = {model.get_decoder(): graphs for model in models if (graphs := graphs_of(model)) is not None}
    for decoder in held:
        decoder._trl_graphs = None
    try:
        yield
    finally:
        for decoder, graphs in held.items():
            decoder._trl_graphs = graphs


def cuda_graph(function: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
    """Capture `function` as a CUDA graph: the `Record` of GPUs."""
    graph, pool = capture(function, pool)
    return graph.replay, pool


@dataclass
class Pool:
    """Graphs that share one memory pool: those with backward, or those without."""

    held: dict[Hashable, Captured] = field(default_factory=dict)
    memory: Any = None
    room: int = 0
    """Bytes of activations that a forward pass of the checked shape keeps."""
    is_tried: bool = False
    """Whether the first graph was compared with the eager layers."""

    def make_room(self, size: int) -> None:
        """Free all graphs before a larger one: it does not fit into their memory, but they will fit into its own."""
        if self.held and size > max(captured.size for captured in self.held.values()):
            self.held, self.memory = {}, None


class Graphs:
    """The graphs of a decoder, by a key of all that they depend on: shapes, precision, mode, adapters."""

    def __init__(self, decoder: PreTrainedModel, record: Record) -> None:
        self.decoder, self.record = weakref.ref(decoder), record
        layer = next(iter(repeated_layers(decoder)), None)
        # A layer of n weights takes 6 n operations per position, forward and backward.
        self.max_positions = 0.0 if layer is None else LAUNCH_BOUND_FLOPS / 6 / sum(map(_numbers, layer.parameters()))
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Give None: copies and pickles of a model have no graphs."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def forget(self) -> None:
        """Free all graphs and their memory, and read the modules of the decoder anew."""
        modules = list(self.decoder().modules())
        self.tables = [module._modules for module in modules], [module._parameters for module in modules]
        self.structure = self._structure()
        self.places = [(module._parameters, name) for module in modules for name in module._parameters]
        kinds = ("forward", "forward_pre", "backward", "backward_pre")
        self.hooks = [vars(module)[f"_{kind}_hooks"] for module in modules for kind in kinds]
        self.adapters = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
        self.seen: set[Hashable] = set()
        self.gradients = Gradients()
        self.with_backward, self.forward_only = Pool(), Pool()

    @property
    def count(self) -> int:
        """Number of captured graphs."""
        return len(self.with_backward.held) + len(self.forward_only.held)

    def __call__(self, run: Run, inputs: Inputs) -> Any:
        """The output of `run(**inputs)`; of a replay, with hidden states alone."""
        key = self._key(inputs)
        pool = self._pool()
        if key is None or any(captured.is_busy for captured in pool.held.values()):
            return run(**inputs)  # a pending backward pass still needs the activations in the pool
        captured = pool.held.get(key) or self._capture(key, run, inputs)
        return run(**inputs) if captured is None else captured(inputs)

    def _pool(self) -> Pool:
        return self.with_backward if torch.is_grad_enabled() else self.forward_only

    def _key(self, inputs: Inputs) -> Hashable:
        """The key of the graph for these inputs; None if they have to run eagerly."""
        if self._structure() != self.structure:
            self.forget()
        spans: Spans = inputs["spans"]
        grid, device = grid_of(inputs), spans.query_starts.device.type
        if grid.numel() >= self.max_positions or torch.is_inference_mode_enabled() or self._has_hooks():
            return None
        if (name := _unbounded(inputs, grid)) is not None:
            self._disable(f"its layers read {name!r}, which has another shape in every batch")
            return None
        return (
            torch.is_grad_enabled(),
            self.decoder().training,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            *self._settings(),
            _kind(inputs),
            (spans.longest_query, spans.longest_key),
            *self._weights(),
        )

    def _has_hooks(self) -> bool:
        """Whether modules or the gradients of weights have hooks, which a replay would not call."""
        found = (hook for hooks in self.hooks for hook in hooks.values())
        if any(getattr(hook, "__name__", "") != REQUIRES_GRAD for hook in found):
            return True
        held = (table[name] for table, name in self.places)
        return any(p is not None and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in held)

    def _structure(self) -> tuple[list[nn.Module | None], list[str]]:
        """All modules and the names of weights: another value says that some were replaced, added or removed."""
        modules, weights = self.tables
        return [*chain.from_iterable(map(dict.values, modules))], [*chain.from_iterable(weights)]

    def _settings(self) -> Iterator[Hashable]:
        """Host-side settings that may change during training: state of adapters, and dropout probabilities."""
        for adapter in self.adapters:
            scaling = vars(adapter).get("scaling", {})
            yield adapter.disable_adapters, *adapter.active_adapters
            yield *adapter.merged_adapters, *(scaling.values() if isinstance(scaling, dict) else [scaling])
        for dropout in self.dropouts:
            yield dropout.p if dropout.training else 0.0

    def _weights(self) -> Iterator[Hashable]:
        """Address of each weight, and whether it is trained: a graph is valid for these alone."""
        for table, name in self.places:
            if (p := table[name]) is None:
                yield None
                continue
            yield p.data_ptr(), p.requires_grad
            if (state := vars(p).get("quant_state")) is not None:
                yield from _addresses(state)

    def _capture(self, key: Hashable, run: Run, inputs: Inputs) -> Captured | None:
        """Capture the layers on these inputs; None if they have to run eagerly this time or always."""
        if not self.gradients.fit():
            self.forget()
        pool, again = self._pool(), key in self.seen
        self.seen.add(key)
        if self.count >= MAX_GRAPHS or not (pool.is_tried or (again and self._may_try(pool))):
            return None
        captured = Captured(run, inputs, self.gradients if pool is self.with_backward else None, self.places)
        pool.make_room(captured.size)
        try:
            expected = None if pool.is_tried else captured.run_eagerly()
            pool.room = captured.room or pool.room
            memory = captured.record(self.record, pool.memory, room=pool.room)
            reason = "" if expected is None else captured.difference_from(expected)
        except RuntimeError as error:
            if not again:  # this shape may need a kernel that is not loaded yet, which the eager run now loads
                return None
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if reason:
            del captured
            self._disable(reason)
            return None
        pool.held[key], pool.memory, pool.is_tried = captured, memory, True
        return captured

    def _disable(self, reason: str) -> None:
        """Run layers eagerly from now on, and warn why."""
        self.forget()
        self.max_positions = 0
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        logger.warning(f"{type(self.decoder()).__name__} runs without CUDA graphs: {reason}.")

    def _may_try(self, pool: Pool) -> bool:
        """Whether the check of the first graph would overwrite no gradient that earlier micro-batches accumulated."""
        grads = (p.grad for p in self.decoder().parameters())
        return pool is self.forward_only or not any(grad is not None and grad.any() for grad in grads)


def _numbers(weight: nn.Parameter) -> int:
    """How many numbers a weight has, also if two are packed into a byte."""
    state = vars(weight).get("quant_state")
    return weight.numel() if state is None else state.shape.numel()


def _addresses(quant_state: Any) -> Iterator[int]:
    """Addresses of the scales and codes of a weight in 4 bits; the scales may be quantised as well."""
    for value in vars(quant_state).values():
        if isinstance(value, Tensor):
            yield value.data_ptr()
    if quant_state.nested:
        yield from _addresses(quant_state.state2)


def _unbounded(inputs: Inputs, grid: torch.Size) -> str | None:
    """The name of an argument whose shape does not follow from B and T, so that there would be a graph for every batch."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            follows = grid in (value.shape[:2], value.shape[-2:]) or value.numel() == 1
        elif isinstance(value, dict):
            follows = _unbounded(value, grid) is None
        else:
            follows = isinstance(value, bool | int | float | str | Spans | None)
        if not follows:
            return name
    return None


def _kind(value: Any) -> Hashable:
    """What a graph depends on in an argument: all of a constant; shape, precision and need of a gradient of tensors."""
    if isinstance(value, Mapping):
        return tuple((name, _kind(each)) for name, each in value.items())
    if isinstance(value, Spans):
        return tuple(x.shape for x in tensors_of({"spans": value}))
    return (value.shape, value.dtype, value.requires_grad) if isinstance(value, Tensor) else value
