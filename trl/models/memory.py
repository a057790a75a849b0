"""Estimate the memory of a training step without weights and without computing anything.

A step is run on *fake* tensors, which have shapes and no data. Every allocation by an operation, and the moment at which it
is freed, is recorded, so the peak is that of the real step: of this architecture, layout, loss, adapter and checkpointing.
The parts, for a decoder in b bytes per number (B·T = S positions, H hidden, I inner width of the MLP, A·D = H heads by
their width, K·D width of keys and of values, L layers, V vocabulary, M scored tokens):

    weights        b · P                                      P parameters
    gradients      b · P_trained
    optimizer      2 · b · P_trained                          Adam's two moments
    activations    b · S · Σ_layers (saved for backward), per layer of a Llama:
                   4H      two norms: their input in float32, and the normalised input
                   + 2H    inputs of q, k, v and of the MLP's first matrices
                   + H + 2KD + …   rotated q, k; v
                   + H     output of attention, the input of its projection
                   + 4I    gate, its SiLU, up, their product
                   with checkpointing: H per layer, and one layer's worth of the above
                   under autocast to half precision on CUDA, in bytes for a position: 8H, the norms' inputs + 10H, each
                   rounded input of q, k, v, gate and up + 4H + 4KD + 4A for attention + 8I; and once 2 for each weight
    logits         4 · min(M·V, kept) + chunks of the head    see `trl.ops.logprobs`; on CUDA, a tile of them
    cache          2 · b · L · K·D · N · T                    KV cache of N sequences while sampling

On a CPU the process may use up to twice this, since the allocator of the C library fragments memory.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER = "weights", "reference", "gradients", "optimizer"
ACTIVATIONS, LOGITS, CACHE = "activations", "logits", "cache"
PARTS = (WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS)


@dataclass(frozen=True)
class Event:
    """A block of memory is allocated (`size` > 0) or freed (`size` < 0). `number` identifies the block."""

    number: int
    size: int


class Trace(TorchDispatchMode):
    """Records all allocations and frees of operations on tensors, and what each block is used for.

    Fake tensors have no values: code that reads a number from one gets zero, and `allclose` is true.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.events: list[Event] = []
        self.part: dict[int, str] = {}
        self._number: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.prim.device.default:  # the most frequent call
            return args[0].fake_device
        if function is torch.ops.aten.allclose.default:
            return True
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: Tensor, part: str | None = None) -> None:
        """Record the allocation of a tensor if its storage is new; with `part`, set what it is used for."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._number:
            number = self._number[key] = len(self.part)
            logits = tensor.dim() == 2 and tensor.shape[-1] == self.vocabulary
            self.part[number] = LOGITS if logits else ACTIVATIONS
            self.events.append(Event(number, storage.nbytes()))
            weakref.finalize(storage, self._free, key, storage.nbytes())
        if part is not None:
            self.part[self._number[key]] = part

    def _free(self, key: int, size: int) -> None:
        self.events.append(Event(self._number.pop(key), -size))

    def alive(self, number: int) -> bool:
        """Whether a block is not freed yet."""
        return number in self._number.values()

    def mark(self, tensors: Iterator[Tensor], part: str) -> None:
        for tensor in tensors:
            self.see(tensor, part)


@contextmanager
def tracing(vocabulary: int) -> Iterator[Trace]:
    """Within the context, tensors are fake: operations compute nothing, and the trace records their memory."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copies of a model
        # torch reads `.grad` of every tensor that it makes fake. It hides the warning, which may still be turned into an error.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Trace(vocabulary))


def take_shape(model: nn.Module, device: torch.device) -> None:
    """Replace a model's weights, in place, by fake tensors on `device`; tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                table[name] = made[id(tensor)]


def trace_step(
    trace: Trace,
    model: nn.Module,
    step: Callable[[], None],
    *,
    state_sizes: Callable[[Tensor], Sequence[int]],
    scratch: int = 0,
) -> None:
    """Trace an optimizer step other than the first, so that the optimizer's states exist. `step()` computes the gradients.

    `state_sizes(parameter)` are the bytes of each optimizer state of a parameter; `scratch` are the bytes that the optimizer
    allocates temporarily during the update.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device, sizes = trained[0].device, [size for p in trained for size in state_sizes(p)]
    states = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    trace.mark(iter(states), OPTIMIZER)
    step()
    trace.mark((p.grad for p in trained if p.grad is not None), GRADIENTS)
    trace.mark(iter([torch.empty(scratch, dtype=torch.uint8, device=device)]), OPTIMIZER)


# ---- the peak ----


def peak_parts(events: Sequence[Event], part: Mapping[int, str]) -> dict[str, int]:
    """Allocated bytes at the peak, by what they are used for."""
    now = peak = at = 0
    for i, event in enumerate(events):
        now += event.size
        if now > peak:
            peak, at = now, i
    parts = dict.fromkeys(PARTS, 0)
    for event in events[: at + 1]:
        parts[part[event.number]] += event.size
    return parts


def cache_bytes(config: PreTrainedConfig, *, sequences: int, tokens: int, bytes_per_number: int) -> int:
    """Bytes of a decoder's KV cache for `sequences` sequences of `tokens` tokens each."""
    text = config.get_text_config(decoder=True)
    names = text.to_dict()
    heads = text.num_attention_heads
    width = (names.get("num_key_value_heads") or heads) * (names.get("head_dim") or text.hidden_size // heads)
    return 2 * bytes_per_number * text.num_hidden_layers * width * sequences * tokens
