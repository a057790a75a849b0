"""How much memory a training step takes, found out without weights and without computing anything.

A step is run on *fake* tensors, which have shapes and no data. Every tensor that an operation makes, and the moment at
which it is let go, is written down, so the peak is that of the real step: of this architecture, layout, loss, adapter
and checkpointing. What it comes to, for a decoder in b bytes per number (B·T = S positions, H hidden, I inner width of
the MLP, A·D = H heads by their width, K·D width of keys and of values, L layers, V vocabulary, M scored tokens):

    weights        b · P                                      P parameters
    gradients      b · P_trained
    optimizer      2 · b · P_trained                          Adam's two moments
    activations    b · S · Σ_layers (saved for backward), per layer of a Llama:
                   4H      two norms: their input in float32, and the normalised input
                   + 2H    what q, k, v and the MLP's first matrices read
                   + H + 2KD + …   rotated q, k; v
                   + H     output of attention, which its projection reads
                   + 4I    gate, its SiLU, up, their product
                   with checkpointing: H per layer, and one layer's worth of the above
                   under autocast to half precision on CUDA, in bytes for a position: 8H, the norms' inputs + 10H, each
                   rounded input of q, k, v, gate and up + 4H + 4KD + 4A for attention + 8I; and once 2 for each weight
    logits         4 · min(M·V, kept) + chunks of the head    see `trl.ops.logprobs`; on CUDA, a tile of them
    cache          2 · b · L · K·D · N · T                    keys and values of N sequences while sampling

On a CPU the process may hold up to twice this: the C library's allocator keeps holes between blocks.
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
    """A block of memory that is asked for (`size` > 0), or given back (`size` < 0). `number` identifies the block."""

    number: int
    size: int


class Trace(TorchDispatchMode):
    """Writes down which memory operations ask for and give back, and what it is for.

    Values are never looked at: what code asks of fake tensors is answered with zero, and comparisons succeed.
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
        if function is torch.ops.prim.device.default:  # asked for more often than all else
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
        """Count the memory of a tensor, if it is new; with `part`, say what it is for."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._number:
            number = self._number[key] = len(self.part)
            logits = tensor.dim() == 2 and tensor.shape[-1] == self.vocabulary
            self.part[number] = LOGITS if logits else ACTIVATIONS
            self.events.append(Event(number, storage.nbytes()))
            weakref.finalize(storage, self._let_go, key, storage.nbytes())
        if part is not None:
            self.part[self._number[key]] = part

    def _let_go(self, key: int, size: int) -> None:
        self.events.append(Event(self._number.pop(key), -size))

    def alive(self, number: int) -> bool:
        """Whether a block has not been given back."""
        return number in self._number.values()

    def mark(self, tensors: Iterator[Tensor], part: str) -> None:
        for tensor in tensors:
            self.see(tensor, part)


@contextmanager
def tracing(vocabulary: int) -> Iterator[Trace]:
    """Operations on tensors compute nothing, and their memory is written down."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copies of a model
        # torch looks at gradients of all that it makes fake, and keeps this from being shown, not from being an error.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Trace(vocabulary))


def take_shape(model: nn.Module, device: torch.device) -> None:
    """Put fake tensors on `device` in the place of a model's weights, in place; tied weights stay tied."""
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
    """Run an optimizer step that is not the first on fake weights: `step()` leaves gradients behind.

    `state_sizes(parameter)` are the bytes of each state that the optimizer keeps of a parameter, and `scratch` bytes are
    what it asks for while it updates them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device, sizes = trained[0].device, [size for p in trained for size in state_sizes(p)]
    states = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    trace.mark(iter(states), OPTIMIZER)
    step()
    trace.mark((p.grad for p in trained if p.grad is not None), GRADIENTS)
    trace.mark(iter([torch.empty(scratch, dtype=torch.uint8, device=device)]), OPTIMIZER)


# ---- what the events come to ----


def peak_parts(events: Sequence[Event], part: Mapping[int, str]) -> dict[str, int]:
    """Bytes alive at the moment when most are, by what they are for."""
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
    """Keys and values of `sequences` of `tokens` each, while a decoder samples."""
    text = config.get_text_config(decoder=True)
    names = text.to_dict()
    heads = text.num_attention_heads
    width = (names.get("num_key_value_heads") or heads) * (names.get("head_dim") or text.hidden_size // heads)
    return 2 * bytes_per_number * text.num_hidden_layers * width * sequences * tokens
