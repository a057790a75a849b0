"""One graph of a model's layers: its capture, its replay forward and backward, and the gradients that it accumulates.

`trl.models.graphs` says when layers are captured, and finds the graph of a batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from trl.models.fused import close
from trl.ops.rng import preserved_rng
from trl.types import Spans

Inputs = Mapping[str, Any]
"""Arguments of a decoder's forward, by name: constants, tensors, dicts of tensors, and spans."""
Run = Callable[..., ModelOutput]
"""A decoder's forward: returns an output with `last_hidden_state` `[B,T,H]`."""
Places = Sequence[tuple[dict[str, Any], str]]
"""Where a decoder's modules have their weights: tables of parameters, and names in them."""
Record = Callable[[Callable[[], None], Any], tuple[Callable[[], None], Any]]
"""Captures a function in a memory pool (None: a new one); returns the function that replays it, and the pool."""


class Captured:
    """The captured forward of a decoder, and with `gradients` its backward, on inputs of one shape."""

    def __init__(self, run: Run, inputs: Inputs, gradients: Gradients | None, weights: Places) -> None:
        self.run, self.gradients, self.weights = run, gradients, weights
        self.inputs = {name: _static(value) for name, value in inputs.items()}
        self.places = tensors_of(self.inputs)
        self.device = self.places[0].device
        self.hidden = self.grad = torch.empty(0, device=self.device)
        self.output: type[ModelOutput] = ModelOutput
        self.learned: list[nn.Parameter] = []
        self.leaves: list[nn.Parameter] = []
        """What stands for `learned` in the autograd graph of a capture: see `fresh_leaves`."""
        self.sources = [] if gradients is None else [place for place in self.places if place.requires_grad]
        """Inputs that need a gradient: embeddings of tokens and images, where these are computed outside of the graph."""
        self.source_grads: tuple[Tensor, ...] = ()
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._pending: weakref.ref[Pending] | None = None
        self.room = 0
        """Bytes of activations that forward keeps, as `run_eagerly` measures; `record` reserves that many in a new pool."""

    @property
    def size(self) -> int:
        """Number of positions (B · T) of the inputs."""
        return grid_of(self.inputs).numel()

    def record(self, record: Record, pool: Any, *, room: int = 0) -> Any:
        """Capture forward and backward in the memory pool `pool`, or in a new one; return the pool.

        A new pool starts with one block of `room` bytes, since many small blocks would be fragmented.
        """
        self.room = room if pool is None else 0
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)  # each replay has to cast the weights again
        try:
            self.replay_forward, pool = record(self._forward, pool)
            if self.gradients is not None:
                self.gradients.make(self.learned)
                self.grad = torch.empty_like(self.hidden, requires_grad=False)
                self.replay_backward, pool = record(self._backward, pool)
            self.hidden, self.leaves = self.hidden.detach(), []  # frees the autograd graph of the capture
        finally:
            torch.set_autocast_cache_enabled(cached)
        return pool

    def _forward(self) -> None:
        torch.empty(self.room, dtype=torch.uint8, device=self.grad.device)  # freed at once: the pool keeps the block
        with torch.set_grad_enabled(self.gradients is not None), fresh_leaves(self.weights) as weight_of:
            self.hidden = self._run()
            self.leaves = learned_by(self.hidden)
        self.learned = [weight_of.get(leaf, leaf) for leaf in self.leaves]

    def _run(self) -> Tensor:
        output = self.run(**self.inputs)
        self.output = type(output)
        return output.last_hidden_state

    def _backward(self) -> None:
        # A hook adds each gradient to its buffer as soon as it is computed, so that none is held until the end.
        with ExitStack() as hooks, torch.autocast(self.grad.device.type, enabled=False):
            for leaf, p in zip(self.leaves, self.learned, strict=True):
                hooks.enter_context(leaf.register_hook(self.gradients.buffers[p].add_))
            found = torch.autograd.grad(self.hidden, [*self.sources, *self.leaves], self.grad)
        self.source_grads = found[: len(self.sources)]

    # ---- replay ----

    def __call__(self, inputs: Inputs) -> ModelOutput:
        return self.output(last_hidden_state=self._replayed(tensors_of(inputs)))

    def _replayed(self, tensors: Sequence[Tensor]) -> Tensor:
        for place, value in zip(self.places, tensors, strict=True):
            place.detach().copy_(value.detach())
        if self.gradients is None:
            self.replay_forward()
            return self.hidden.clone()
        sources = [value for place, value in zip(self.places, tensors, strict=True) if place.requires_grad]
        weights = self.learned if torch.distributed.is_initialized() else ()
        return Replayed.apply(self, self.anchor, *sources, *weights)

    @property
    def is_busy(self) -> bool:
        """Whether the backward pass of the last replay is still pending, and needs the activations of this graph."""
        return self._pending is not None and self._pending() is not None

    def pending(self) -> Pending:
        pending = Pending()
        self._pending = weakref.ref(pending)
        return pending

    # ---- check against the eager layers ----

    def run_eagerly(self) -> tuple[Tensor, Tensor]:
        """Hidden states `[B,T,H]` and the norms of gradients of inputs and weights, without a graph. The RNG state is
        restored."""
        before = _allocated(self.device)
        with preserved_rng(self.device):
            hidden = self._run()
            self.room = _allocated(self.device) - before
            if self.gradients is None:
                return hidden.clone(), hidden.new_zeros(1)
            learned = learned_by(hidden)
            with torch.autocast(self.device.type, enabled=False):
                found = torch.autograd.grad(hidden, [*self.sources, *learned], hidden.detach())
        return hidden.detach().clone(), torch.stack(torch._foreach_norm(found)).float()

    def difference_from(self, expected: tuple[Tensor, Tensor]) -> str:
        """Replay the graph, and say in what it differs from the results of `run_eagerly`; empty if in nothing."""
        hidden, norms = expected
        with preserved_rng(hidden.device):
            self.replay_forward()
            half = torch.bfloat16 if hidden.is_cuda else None
            if not close(self.hidden.detach(), hidden, factors=half):
                return "the hidden states of a replay differ from those of the layers"
            if self.gradients is None:
                return ""
            buffers = [self.gradients.buffers[p].zero_() for p in self.learned]
            self.grad.copy_(hidden)
            self.replay_backward()
            found = torch.stack(torch._foreach_norm([*self.source_grads, *buffers])).float()
        same = close(found / norms.max(), norms / norms.max(), factors=half)
        return "" if same else "the gradients of a replay differ from those of the layers"


class Pending:
    """Token of a replay whose backward pass is pending: autograd holds it until that has run, or no longer can."""


class Replayed(torch.autograd.Function):
    """Hidden states `[B,T,H]` of a replay; its backward replays as well, and adds to the weights' gradients itself.

    `tensors` are the inputs that need a gradient, which is returned, and in several processes the weights, whose gradients
    are returned as None. Autograd then visits the weights' gradient accumulators once the replay has run, and the hooks that
    DDP has there reduce what was added. (In one process the weights are no arguments, so that the gradient of a tied head is
    accumulated at once and not held until then.)
    """

    @staticmethod
    def forward(ctx: Any, captured: Captured, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.captured, ctx.pending = captured, captured.pending()
        captured.replay_forward()
        return captured.hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        captured: Captured = ctx.captured
        if ctx.pending is None:
            raise RuntimeError(
                "backward was called a second time through layers that run as CUDA graphs. Their activations are freed by "
                "the first call, even with retain_graph=True: add the losses up and call backward once, or set "
                "cuda_graphs=False."
            )
        captured.gradients.attach(captured.learned)
        captured.grad.copy_(grad)
        captured.replay_backward()
        ctx.pending = None
        found = [grad.clone() for grad in captured.source_grads]  # the next replay overwrites them
        return None, None, *found, *[None] * (len(ctx.needs_input_grad) - 2 - len(found))


class Gradients:
    """Static buffers, one for each trained weight, to which graphs add gradients."""

    def __init__(self) -> None:
        self.buffers: dict[nn.Parameter, Tensor] = {}

    def make(self, learned: Sequence[nn.Parameter]) -> None:
        """Make a buffer for each weight that has none."""
        for parameter in learned:
            if parameter not in self.buffers:
                self.buffers[parameter] = torch.zeros_like(parameter, requires_grad=False)

    def fit(self) -> bool:
        """Whether buffers still match their weights, whose shape, dtype or device may be changed in place."""
        kinds = ((x.shape, x.dtype, x.device) for pair in self.buffers.items() for x in pair)
        return all(weight == buffer for weight, buffer in zip(kinds, kinds, strict=True))

    def attach(self, learned: Sequence[nn.Parameter]) -> None:
        """Make each buffer the `grad` of its weight, holding the present gradient, or zero where there is none."""
        empty = []
        for parameter in learned:
            buffer = self.buffers[parameter]
            if parameter.grad is None:
                empty.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if empty:
            torch._foreach_zero_(empty)


def learned_by(hidden: Tensor) -> list[nn.Parameter]:
    """The weights that backward from `hidden` reaches."""
    found, nodes, seen = [], [hidden.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):  # not the output of embeddings, which a hook may make a leaf
            found.append(variable)
    return found


@contextmanager
def fresh_leaves(places: Places) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Replace trained weights within the context by parameters that share their memory; yields these and their weights.

    The node that accumulates the gradient of a weight belongs to the stream on which it was made, which backward would wait for
    in the middle of a capture. DDP keeps the nodes of all weights, made before on the stream of training.
    """
    held = [(table, name, p) for table, name in places if type(p := table[name]) is nn.Parameter and p.requires_grad]
    fresh = {p: nn.Parameter(p.detach()) for _, _, p in held}
    for table, name, p in held:
        table[name] = fresh[p]
    try:
        yield {leaf: p for p, leaf in fresh.items()}
    finally:
        for table, name, p in held:
            table[name] = p


def _static(value: Any) -> Any:
    """An argument whose tensors are copied to places of their own."""
    if isinstance(value, dict):
        return {name: _static(each) for name, each in value.items()}
    if isinstance(value, Spans):
        return value.map(Tensor.clone)
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def grid_of(inputs: Inputs) -> torch.Size:
    """The shape `[B,T]` of a batch of tokens or embeddings."""
    ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
    return (embeddings if ids is None else ids).shape[:2]


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors among the arguments of forward, including those of the spans."""
    found: list[Tensor] = []
    for value in inputs.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += tensors_of(value)
        elif isinstance(value, Spans):
            found += [x for x in (value.query_starts, value.key_starts, value.keys) if x is not None]
    return found


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
