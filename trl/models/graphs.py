"""A model's layers as CUDA graphs: forward and backward of a micro-batch are one launch each, however many kernels they have.

A kernel costs the host 5 to 70 µs, and a layer has some seventy of them, forward and backward: below `WORTHWHILE` the device
waits for the host. A captured graph is launched at once, and reads and writes fixed places:

    inputs      are copied into place. Batches are laid out in few shapes (`trl.data.layout`), filled up with padding
    output      hidden states `[B,T,H]`, which a head reads as ever; their gradient is copied into place on the way back
    gradients   of weights are added to buffers, which are the weights' `grad` from then on

The first size runs as ever the first time, and is captured the second time, and tried: hidden states and gradients must be
those of the same layers without a graph. Further sizes are captured when they are seen; all of them anew when one is larger
than those before, so that they share the memory of the largest. Layers that cannot be captured (the host needs a number of
theirs in between, as in some mixtures of experts) run as before, with one warning; and so do layers while hooks watch them.
"""

from __future__ import annotations

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

from trl.models.captured import Captured, Gradients, Record, Run
from trl.models.compiled import repeated_layers
from trl.types import Spans

logger = logging.getLogger(__name__)

INPUTS = frozenset({"input_ids", "position_ids", "attention_mask", "spans"})
"""What a captured forward may read: all else (pixel values, masks) comes in too many shapes."""
WORTHWHILE = 2e12
"""Floating-point operations of a layer, forward and backward, below which it is launched for longer than it computes: 5 ms at
400 TFLOP/s, or seventy launches of 70 µs."""
MOST = 24
"""Graphs that a model holds, with gradient and without; further sizes run as ever."""
REQUIRES_GRAD = "make_inputs_require_grads"
"""The hook on embeddings by which `transformers` lets adapters and checkpointed layers learn."""


def captures(model: PreTrainedModel, positions: int) -> bool:
    """Whether passes over so many positions are to be replayed: a layer computes for less time than the host launches it."""
    graphs: Graphs | None = vars(model).get("_trl_graphs")
    return graphs is not None and positions < graphs.most


def capture_layers(model: PreTrainedModel, record: Record | None = None) -> None:
    """Let the hidden states that heads of `model` ask for come from graphs; `record` makes them, CUDA's by default."""
    model._trl_graphs = Graphs(model, record or cuda_graph)


def release(model: PreTrainedModel, *, for_good: bool) -> None:
    """Let the memory of a model's graphs go; `for_good`, none are captured from now on."""
    if (graphs := vars(model).get("_trl_graphs")) is None:
        return
    graphs.forget()
    if for_good:
        del model._trl_graphs


def capture_as(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Capture a model that reads the policy's batches, where the policy is."""
    if (graphs := vars(policy).get("_trl_graphs")) is not None:
        capture_layers(model, graphs.record)


def replayed(model: PreTrainedModel, run: Run, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states `[B,T,H]`: `run(**inputs)`, by a graph where there is one."""
    graphs: Graphs | None = vars(model).get("_trl_graphs")
    return run(**inputs) if graphs is None else graphs(run, inputs)


@contextmanager
def without_graphs(model: PreTrainedModel) -> Iterator[None]:
    """Within it, gradients reach weights through autograd alone, which can be asked for them."""
    graphs = vars(model).pop("_trl_graphs", None)
    try:
        yield
    finally:
        if graphs is not None:
            model._trl_graphs = graphs


def cuda_graph(function: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
    """See `Record`."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
    except BaseException:
        torch.cuda.set_stream(stream)
        raise
    return graph.replay, graph.pool()


@dataclass
class Pool:
    """Graphs that share one memory: those with gradients, or those without."""

    held: dict[Hashable, Captured] = field(default_factory=dict)
    memory: Any = None
    room: int = 0
    """Bytes that a forward pass of the size that was tried keeps."""
    is_tried: bool = False

    def make_room(self, size: int) -> None:
        """Let smaller graphs and their memory go before a larger one: they fit into its memory, and it not into theirs."""
        if self.held and size > max(captured.size for captured in self.held.values()):
            self.held, self.memory = {}, None


class Graphs:
    """The graphs of a model, by what they were captured from: sizes, precision, mode, adapters."""

    def __init__(self, model: PreTrainedModel, record: Record) -> None:
        self.model, self.record = weakref.ref(model), record
        layer = next(iter(repeated_layers(model)), None)
        self.most = 0.0 if layer is None else WORTHWHILE / 6 / sum(p.numel() for p in layer.parameters())
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copies and pickles of a model have no graphs."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def forget(self) -> None:
        """Let all graphs and their memory go."""
        modules = list(self.model().modules())
        self.tables = [module._modules for module in modules], [module._parameters for module in modules]
        self.built = self._as_built()
        self.places = [(module._parameters, name) for module in modules for name in module._parameters]
        kinds = ("forward", "forward_pre", "backward", "backward_pre")
        self.hooks = [vars(module)[f"_{kind}_hooks"] for module in modules for kind in kinds]
        self.adapters = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
        self.seen: set[Hashable] = set()
        self.gradients = Gradients()
        self.learning, self.reading = Pool(), Pool()

    @property
    def count(self) -> int:
        """How many graphs there are."""
        return len(self.learning.held) + len(self.reading.held)

    def __call__(self, run: Run, inputs: Mapping[str, Any]) -> Tensor:
        key = self._key(inputs)
        pool = self._pool()
        if key is None or any(captured.is_busy for captured in pool.held.values()):
            return run(**inputs)  # what the pool holds may be needed by a backward pass to come
        captured = pool.held.get(key) or self._capture(key, run, inputs)
        return run(**inputs) if captured is None else captured(inputs)

    def _pool(self) -> Pool:
        return self.learning if torch.is_grad_enabled() else self.reading

    def _key(self, inputs: Mapping[str, Any]) -> Hashable:
        """By what a graph is found; None where these inputs have none."""
        given = {name for name, value in inputs.items() if value is not None}
        if not isinstance(spans := inputs.get("spans"), Spans) or not given <= INPUTS:
            return None
        ids = inputs["input_ids"]
        if self._as_built() != self.built:
            self.forget()
        if ids.numel() >= self.most or torch.is_inference_mode_enabled() or self._is_watched():
            return None
        device = ids.device.type
        return (
            torch.is_grad_enabled(),
            self.model().training,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            *self._settings(),
            *((name, value.shape) for name, value in inputs.items() if isinstance(value, Tensor)),
            (spans.query_starts.shape, spans.keys is None or spans.keys.shape),
            (spans.longest_query, spans.longest_key),
            *self._weights(),
        )

    def _is_watched(self) -> bool:
        """Whether hooks look at modules, or wait for gradients, which replays do not tell of."""
        found = (hook for hooks in self.hooks for hook in hooks.values())
        if any(getattr(hook, "__name__", "") != REQUIRES_GRAD for hook in found):
            return True
        held = (table[name] for table, name in self.places)
        return any(p is not None and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in held)

    def _as_built(self) -> tuple[list[nn.Module | None], list[str]]:
        """Modules, and the names of weights, which change where some are replaced, added or taken away."""
        modules, weights = self.tables
        return [*chain.from_iterable(map(dict.values, modules))], [*chain.from_iterable(weights)]

    def _settings(self) -> Iterator[Hashable]:
        """What layers read on the host and may be changed while a model is trained."""
        for adapter in self.adapters:
            scaling = vars(adapter).get("scaling", {})
            yield adapter.disable_adapters, *adapter.active_adapters
            yield *adapter.merged_adapters, *(scaling.values() if isinstance(scaling, dict) else [scaling])
        for dropout in self.dropouts:
            yield dropout.p if dropout.training else 0.0

    def _weights(self) -> Iterator[tuple[int, bool] | None]:
        """Where weights are, and whether they learn: others may stand in their places for a while."""
        held = (table[name] for table, name in self.places)
        return (None if p is None else (p.data_ptr(), p.requires_grad) for p in held)

    def _capture(self, key: Hashable, run: Run, inputs: Mapping[str, Any]) -> Captured | None:
        """What these inputs run as a graph; None where it is not captured."""
        if not self.gradients.fit():
            self.forget()
        pool, again = self._pool(), key in self.seen
        self.seen.add(key)
        if self.count >= MOST or not (pool.is_tried or (again and self._may_try(pool))):
            return None
        captured = Captured(run, inputs, self.gradients if pool is self.learning else None)
        pool.make_room(captured.size)
        try:
            expected = None if pool.is_tried else captured.tried()
            pool.room = captured.room or pool.room
            memory = captured.record(self.record, pool.memory, room=pool.room)
            reason = "" if expected is None else captured.differs(expected)
        except RuntimeError as error:
            if not again:  # a kernel of this size alone may have to be loaded
                return None
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if reason:
            del captured
            self._give_up(reason)
            return None
        pool.held[key], pool.memory, pool.is_tried = captured, memory, True
        return captured

    def _give_up(self, reason: str) -> None:
        """Let layers run as ever from now on, and say why."""
        self.forget()
        self.most = 0
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        logger.warning(f"{type(self.model()).__name__} runs without CUDA graphs: {reason}.")

    def _may_try(self, pool: Pool) -> bool:
        """Whether no weight has a gradient that a trial would overwrite, of a micro-batch before this one."""
        grads = (p.grad for p in self.model().parameters())
        return pool is self.reading or not any(grad is not None and grad.any() for grad in grads)
