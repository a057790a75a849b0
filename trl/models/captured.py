"""One graph of a model's layers: what was captured, its replay in both directions, and the gradients that it adds to.

See `trl.models.graphs` for when one is captured, and how it is found.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl.models.fused import close
from trl.types import Spans

Run = Callable[..., Tensor]
"""Hidden states `[B,T,H]` from a forward's arguments."""
Record = Callable[[Callable[[], None], Any], tuple[Callable[[], None], Any]]
"""Runs a function so that it can be replayed, in a pool of memory or a new one; gives what replays it, and the pool."""


class Captured:
    """Forward, and with `gradients` backward, of a model on inputs of one size."""

    def __init__(self, run: Run, inputs: Mapping[str, Any], gradients: Gradients | None) -> None:
        self.run, self.gradients = run, gradients
        self.inputs = {k: v.map(Tensor.clone) if isinstance(v, Spans) else _cloned(v) for k, v in inputs.items()}
        self.hidden = self.grad = torch.empty(0, device=inputs["input_ids"].device)
        self.learned: list[nn.Parameter] = []
        self.anchor = torch.zeros((), device=inputs["input_ids"].device, requires_grad=True)
        self._pending: weakref.ref[Pending] | None = None
        self.room = 0
        """Bytes that forward keeps, once it was tried; what is asked for at first where a pool is new."""

    @property
    def size(self) -> int:
        """Positions of its inputs."""
        return self.inputs["input_ids"].numel()

    def record(self, record: Record, pool: Any, *, room: int = 0) -> Any:
        """Capture both directions; the pool of memory that they share with others of their kind.

        A new pool begins with `room` bytes in one piece: pieces of their own would have holes between them.
        """
        self.room = room if pool is None else 0
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)  # what is rounded in a graph is rounded anew by each replay
        try:
            self.replay_forward, pool = record(self._forward, pool)
            if self.gradients is not None:
                self.learned = self.gradients.of(self.hidden)
                self.grad = torch.empty_like(self.hidden, requires_grad=False)
                self.replay_backward, pool = record(self._backward, pool)
            self.hidden = self.hidden.detach()  # what autograd keeps for it would stay
        finally:
            torch.set_autocast_cache_enabled(cached)
        return pool

    def _forward(self) -> None:
        torch.empty(self.room, dtype=torch.uint8, device=self.grad.device)  # given back at once
        with torch.set_grad_enabled(self.gradients is not None):
            self.hidden = self.run(**self.inputs)

    def _backward(self) -> None:
        # Each gradient is added when it comes, so that none has to be kept.
        with ExitStack() as hooks, torch.autocast(self.grad.device.type, enabled=False):
            for p in self.learned:
                hooks.enter_context(p.register_hook(self.gradients.buffers[p].add_))
            torch.autograd.grad(self.hidden, self.learned, self.grad)

    # ---- replay ----

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        for place, value in zip(_tensors_of(self.inputs), _tensors_of(inputs), strict=True):
            place.copy_(value)
        if self.gradients is None:
            self.replay_forward()
            return self.hidden.clone()
        self.gradients.attach(self.learned)
        return Replayed.apply(self, self.anchor, *(self.learned if torch.distributed.is_initialized() else ()))

    @property
    def is_busy(self) -> bool:
        """Whether a backward pass is still to come."""
        return self._pending is not None and self._pending() is not None

    def pending(self) -> Pending:
        pending = Pending()
        self._pending = weakref.ref(pending)
        return pending

    # ---- trial ----

    def tried(self) -> tuple[Tensor, Tensor]:
        """Hidden states, and norms of gradients, without a graph; random numbers are drawn as if nothing had been tried."""
        ids = self.inputs["input_ids"]
        device, before = ids.device, _allocated(ids.device)
        with _undrawn(device):
            hidden = self.run(**self.inputs)
            self.room = _allocated(device) - before
            if self.gradients is None:
                return hidden.clone(), hidden.new_zeros(1)
            learned = self.gradients.of(hidden)
            with torch.autocast(device.type, enabled=False):
                found = torch.autograd.grad(hidden, learned, hidden.detach())
        return hidden.detach().clone(), torch.stack(torch._foreach_norm(found)).float()

    def differs(self, expected: tuple[Tensor, Tensor]) -> str:
        """In what a replay differs from these; nothing if it does not."""
        hidden, norms = expected
        with _undrawn(hidden.device):
            self.replay_forward()
            half = torch.bfloat16 if hidden.is_cuda else None
            if not close(self.hidden.detach(), hidden, factors=half):
                return "their hidden states are others"
            if self.gradients is None:
                return ""
            buffers = [self.gradients.buffers[p].zero_() for p in self.learned]
            self.grad.copy_(hidden)
            self.replay_backward()
            found = torch.stack(torch._foreach_norm(buffers)).float()
        return "" if close(found / norms.max(), norms / norms.max(), factors=half) else "their gradients are others"


class Pending:
    """Lives until the backward pass of a replay has run, or can no longer run."""


class Replayed(torch.autograd.Function):
    """Hidden states `[B,T,H]` of a replay; backward replays too, and adds to the gradients of weights by itself.

    Among several processes the weights are arguments, whose gradients from here are None: autograd comes by their places
    once the replay has run, and DDP, which waits there, exchanges what was added. (In one process a tied head's gradient
    is added at once, and not kept until then.)
    """

    @staticmethod
    def forward(ctx: Any, captured: Captured, anchor: Tensor, *weights: Tensor) -> Tensor:
        ctx.captured, ctx.pending = captured, captured.pending()
        captured.replay_forward()
        return captured.hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        captured: Captured = ctx.captured
        if ctx.pending is None:
            raise RuntimeError(
                "backward runs a second time through layers that were replayed, and what they kept is gone, whatever "
                "retain_graph says: add the losses up and call backward once, or set cuda_graphs=False."
            )
        captured.gradients.attach(captured.learned)  # again: they may have been dropped since forward
        captured.grad.copy_(grad)
        captured.replay_backward()
        ctx.pending = None
        return (None,) * len(ctx.needs_input_grad)


class Gradients:
    """Where graphs add the gradients of weights: a buffer for each that learns."""

    def __init__(self) -> None:
        self.buffers: dict[nn.Parameter, Tensor] = {}

    def of(self, hidden: Tensor) -> list[nn.Parameter]:
        """The weights that `hidden` has gradients of, each with a buffer."""
        found, nodes, seen = [], [hidden.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
            variable = getattr(node, "variable", None)
            if isinstance(variable, nn.Parameter):  # and no embeddings, which hooks let have gradients
                found.append(variable)
        for parameter in found:
            if parameter not in self.buffers:
                self.buffers[parameter] = torch.zeros_like(parameter, requires_grad=False)
        return found

    def fit(self) -> bool:
        """Whether buffers are still like their weights, which may be given another size or precision in place."""
        kinds = ((x.shape, x.dtype, x.device) for pair in self.buffers.items() for x in pair)
        return all(weight == buffer for weight, buffer in zip(kinds, kinds, strict=True))

    def attach(self, learned: Sequence[nn.Parameter]) -> None:
        """Let buffers be the gradients of their weights, with what these have, or zero."""
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


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensors_of(inputs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among a forward's arguments, those of spans included."""
    found: list[Tensor] = []
    for value in inputs.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Spans):
            found += [x for x in (value.query_starts, value.key_starts, value.keys) if x is not None]
    return found


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def _undrawn(device: torch.device) -> Iterator[None]:
    """Random numbers that are drawn within it are drawn again after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
