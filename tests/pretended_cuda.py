"""A CUDA device that is not there, for tests on machines without one: `pytest --pretend-cuda tests/trainers`.

Tensors stay in the memory of the CPU. Those that would be on the device are marked, by an attribute of their storage, and say
that they are on "cuda:0"; `torch.cuda` says that there is a device. So the library takes the paths of CUDA: autocast, pinned
buffers, attention of variable length, CUDA graphs, the sampler with static buffers. As on a device, these are errors:

- an operation on tensors of both devices, unless the one of the CPU is a number or an index;
- `numpy()` of a tensor on the device, and drawing with a generator of the other one;
- while a graph is recorded, to read a number, to copy from one device to the other, and what depends on values for its shape.

Kernels of Triton are replaced by what runs on CPUs (they have tests of their own, in Triton's interpreter), CUDA's by plain
computations, and graphs by running again what was recorded. Nothing is asynchronous, and no memory is counted. Threads and
processes that a test starts do not see the device.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from tests.models.test_models_graphs import Recorder
from trl.models import graphs, kept_activations, varlen
from trl.ops import logprobs
from trl.rollouts import local, loop
from trl.trainers import layers

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GIB = 2**30


class DeviceError(RuntimeError):
    """What CUDA refuses."""


# ---- which tensors are on the device ----


def is_on_device(x: Tensor) -> bool:
    storage = _storage(x)
    return storage is not None and getattr(storage, "on_device", False)


def mark(x: Tensor, on_device: bool) -> Tensor:
    if (storage := _storage(x)) is not None:
        storage.on_device = on_device
    return x


def _storage(x: Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor of the CPU; None for tensors without data, and for those that wrap others."""
    with torch._C.DisableTorchFunction():
        if x.device.type != "cpu" or x.layout != torch.strided or hasattr(type(x), "__tensor_flatten__"):
            return None
        try:
            return x.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return None


def tensors_in(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(trees) if isinstance(leaf, Tensor)]


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to_device: bool) -> Tensor:
        ctx.back = is_on_device(x)
        return mark(x.detach().clone(), to_device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return mark(grad.clone(), ctx.back), None


def moved(x: Tensor, to_device: bool) -> Tensor:
    if _storage(x) is None or is_on_device(x) == to_device:
        return x
    if NOW.records:
        raise DeviceError("operation not permitted when stream is capturing: a copy between devices")
    return _Move.apply(x, to_device)


# ---- operations: what they may mix, and where their results are ----

NOW = SimpleNamespace(records=False, on_device=False)
"""Whether a graph is recorded, and where tensors are made that no other tensor decides."""

COPIES = {"copy_", "_to_copy", "_foreach_copy_", "set_"}
TAKE_NO_NUMBER = {"cat", "stack", "index_select", "gather", "embedding", "scatter"}
"""Operations that take no number of the CPU among tensors of the device."""
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
"""Operations for which the host waits."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Operations(TorchDispatchMode):
    """Checks the devices of every operation's tensors, also in backward, and marks its results."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        with torch._C.DisableTorchFunction():
            given = [x for x in tensors_in(args, kwargs) if _storage(x) is not None]
            places = [is_on_device(x) for x in given]
            _check(name, given, places)
            on_device = any(places) if given else NOW.on_device
            if given and name in ("copy_", "_to_copy"):
                on_device = places[0]
            before = {id(_storage(x)) for x in given}
            made = _run(function, name, args, kwargs)
            for x in tensors_in(made):
                if id(_storage(x)) not in before:
                    mark(x, on_device)
        return made


def _check(name: str, given: list[Tensor], places: list[bool]) -> None:
    mixes = any(places) and not all(places)
    if NOW.records and any(places):
        by_mask = name in INDEXING and any(x.dtype == torch.bool for x in given[1:])
        if name in WAITS or by_mask or (name in COPIES and mixes):
            raise DeviceError(f"operation not permitted when stream is capturing: {name}")
    if not mixes or name in COPIES or name.startswith("_foreach") or (name in INDEXING and places[0]):
        return
    if name in TAKE_NO_NUMBER or any(x.dim() for x, on_device in zip(given, places, strict=True) if not on_device):
        shapes = ", ".join(f"{list(x.shape)} on {CUDA if p else CPU}" for x, p in zip(given, places, strict=True))
        raise DeviceError(f"Expected all tensors to be on the same device: {name} of {shapes}")


def _run(function: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operation, or how a CPU does what it has no kernel for."""
    if name in ("mm", "addmm") and function._overloadname.startswith("dtype"):
        *factors, dtype = args
        result = getattr(torch, name)(*(x.to(dtype) for x in factors))
        return result if kwargs.get("out") is None else kwargs["out"].copy_(result)
    if name == "histc" and not args[0].is_floating_point():
        return function(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return function(*args, **kwargs)


# ---- functions: what they are told about devices, and what they say ----

SAYS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.device.__get__: lambda x: CUDA,
    Tensor.is_cuda.__get__: lambda x: True,
    Tensor.is_cpu.__get__: lambda x: False,
    Tensor.get_device: lambda x: 0,
}
"""What a tensor on the device says of itself."""

OF_SELF = {Tensor.new_tensor, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full}
HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


def means_cuda(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


class Functions(TorchFunctionMode):
    """Reads the devices that functions of torch are given; on the inside, all is on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in SAYS:
            return SAYS[function](args[0]) if is_on_device(args[0]) else function(*args)
        if function is torch.device and isinstance(args[0], int):
            return torch.device("cuda", args[0])
        if function in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _to(function, args, kwargs)
        if function is Tensor.backward:
            kwargs["grad_tensors"] = kwargs.pop("gradient", None)
            with self:
                return torch.autograd.backward(*args, **kwargs)
        if function is torch.autograd.grad:
            with patch("torch.autograd.has_torch_function", lambda *_: False), self:
                return function(*args, **kwargs)
        if function in (Tensor.numpy, Tensor.__array__) and is_on_device(args[0]):
            raise TypeError("can't convert a tensor on cuda:0 to numpy: copy it to the host first")
        if function is Tensor.pin_memory:
            return args[0]
        if function in HOOKS:
            return function(args[0], seeing_the_device(args[1]))
        return _call(function, args, kwargs)


def _call(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    kwargs.pop("pin_memory", None)
    given, asked = tensors_in(args, kwargs), None
    if kwargs.get("device") is not None:
        asked = means_cuda(kwargs["device"])
        kwargs["device"] = CPU if asked else kwargs["device"]
    elif function in OF_SELF:
        asked = is_on_device(args[0])
    on_device = any(map(is_on_device, given)) if asked is None else asked
    generator = kwargs.get("generator")
    if generator is not None and getattr(generator, "on_device", False) != on_device:
        raise DeviceError(f"Expected a generator of {CUDA if on_device else CPU}")
    with patch.object(NOW, "on_device", on_device):
        made = function(*args, **kwargs)
    if function is Tensor.__deepcopy__:
        return mark(made, is_on_device(args[0]))
    if asked is None or not isinstance(made, Tensor) or is_on_device(made) == asked:
        return made
    return moved(made, asked) if given and function not in OF_SELF else mark(made, asked)


def _to(function: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """`x.to(…)`, `x.cuda()` and `x.cpu()`: the other changes on the CPU, then the move."""
    x, *rest = args
    if function is not Tensor.to:
        return moved(x, function is Tensor.cuda)
    target = None
    if kwargs.get("device") is not None:
        target = means_cuda(kwargs["device"])
        kwargs["device"] = CPU if target else kwargs["device"]
    elif rest and isinstance(rest[0], Tensor):
        target = is_on_device(rest[0])
    elif rest and not isinstance(rest[0], torch.dtype | None):
        target = means_cuda(rest[0])
        rest[0] = CPU if target else rest[0]
    made = function(x, *rest, **kwargs)
    return made if target is None else moved(made, target)


FUNCTIONS = Functions()


def seeing_the_device(function: Callable) -> Callable:
    """`function` with `FUNCTIONS`, which the autograd engine switches off around what it calls."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if FUNCTIONS in _get_current_function_mode_stack() else FUNCTIONS:
            return function(*args, **kwargs)

    return call


class Generator(torch.Generator):
    """A generator that knows on which device it draws."""

    def __new__(cls, device: Any = CPU) -> Generator:
        made = super().__new__(cls, CPU if means_cuda(device) else device)
        made.on_device = means_cuda(device)
        return made

    @property
    def device(self) -> torch.device:
        return CUDA if self.on_device else CPU


class Autocast(torch.autocast):
    def __init__(self, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        super().__init__(device_type, dtype, *args, **kwargs)


def as_cpu(function: Callable) -> Callable:
    """A function of the state of autocast, asked of CUDA."""
    return lambda device="cuda": function("cpu" if device == "cuda" else device)


# ---- torch.cuda, and what runs on CUDA alone ----


class Stream:
    """A stream or an event, of a device that does everything at once."""

    device, cuda_stream = CUDA, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    record = wait = wait_event = synchronize = wait_stream

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


PROPERTIES = SimpleNamespace(name="pretended", total_memory=80 * GIB, major=9, minor=0, multi_processor_count=132)
ANSWERS = {
    "is_available": True,
    "is_initialized": True,
    "init": None,
    "_lazy_init": None,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "get_device_name": PROPERTIES.name,
    "get_device_capability": (9, 0),
    "get_device_properties": PROPERTIES,
    "is_bf16_supported": True,
    "mem_get_info": (70 * GIB, 80 * GIB),
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), 0),
    "reset_peak_memory_stats": None,
    "memory_stats": {},
    "empty_cache": None,
    "ipc_collect": None,
    "synchronize": None,
    "manual_seed": None,
    "manual_seed_all": None,
    "set_rng_state": None,
    "set_rng_state_all": None,
    "set_stream": None,
}
"""Functions of `torch.cuda`, by what they return."""

OTHERS = {
    "is_current_stream_capturing": lambda: NOW.records,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "get_rng_state_all": lambda: [torch.get_rng_state()],
    **dict.fromkeys(("current_stream", "default_stream"), lambda device=None: Stream()),
    **dict.fromkeys(("Stream", "Event"), Stream),
    **dict.fromkeys(("stream", "device", "device_of"), lambda *_: nullcontext()),
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *longest: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's attention of variable length."""
    assert query.dtype in (torch.bfloat16, torch.float16)
    spans: Any = SimpleNamespace(query_starts=query_starts, key_starts=key_starts)
    with patch.object(NOW, "records", False):  # it reads the starts
        window = None if window_size[0] < 0 else window_size[0] + 1
        return varlen.by_runs(query, key, value, spans, scale=scale, window=window)


def recording(function: Callable[[], None]) -> Callable[[], None]:
    """What `function` does while a graph is recorded."""

    def run() -> None:
        with patch.object(NOW, "records", True):
            function()

    run.__self__ = getattr(function, "__self__", None)
    return run


def capture_step(step: Callable[[], None], pool: Any) -> tuple[SimpleNamespace, Any]:
    return SimpleNamespace(replay=recording(step)), pool


def load_to(load: Callable, f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    to_device = isinstance(map_location, str | torch.device) and means_cuda(map_location)
    loaded = load(f, map_location=CPU if to_device else map_location, **kwargs)
    return tree_map_only(Tensor, lambda x: moved(x, True), loaded) if to_device else loaded


@contextmanager
def pretended_cuda() -> Iterator[Recorder]:
    """Pretend that there is a CUDA device; the graphs of layers are recorded by what is returned."""
    recorder = Recorder()
    engine, record = torch.autograd.graph._engine_run_backward, Recorder.__call__
    hooks, frame = torch.autograd.graph.saved_tensors_hooks, torch.utils.checkpoint._CheckpointFrame
    with_hooks, with_function = hooks.__init__, frame.__init__

    def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        with patch.object(NOW, "on_device", any(map(is_on_device, outputs))):
            return engine(outputs, *args, **kwargs)

    patches: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, lambda *_, answer=answer, **__: answer) for name, answer in ANSWERS.items()),
        *((torch.cuda, name, function) for name, function in OTHERS.items()),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "current_stream", lambda device=None: Stream()),
        (torch, "Generator", Generator),
        *((place, "autocast", Autocast) for place in (torch, torch.amp, torch.amp.autocast_mode)),
        *((torch, name, as_cpu(getattr(torch, name))) for name in ("is_autocast_enabled", "get_autocast_dtype")),
        (torch, "load", functools.partial(load_to, torch.load)),
        (torch.autograd, "_engine_run_backward", run_backward),
        (torch.autograd.graph, "_engine_run_backward", run_backward),
        (BackwardCFunction, "apply", seeing_the_device(BackwardCFunction.apply)),
        (hooks, "__init__", lambda self, *each: with_hooks(self, *map(seeing_the_device, each))),
        (frame, "__init__", lambda self, f, *rest, **named: with_function(self, seeing_the_device(f), *rest, **named)),
        (varlen, "varlen_attn", attention),
        (Recorder, "__call__", lambda self, function, pool: record(self, recording(function), pool)),
        (graphs, "cuda_graph", recorder),
        (loop, "capture", capture_step),
        (logprobs, "_implementation", lambda *_: logprobs._LinearLogprobs),
        (kept_activations, "_has_kernel", lambda *_: False),
        (layers, "fuse", lambda model: None),
        (local, "has_triton", lambda: False),
    ]
    for module in (torch.cuda.random, torch.cuda.memory):
        patches += [
            (module, name, new) for place, name, new in patches if place is torch.cuda and hasattr(module, name)
        ]
    with ExitStack() as stack:
        AcceleratorState._reset_state(reset_partial_state=True)
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        stack.enter_context(patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))  # threads do not see the device
        for place, name, new in patches:
            stack.enter_context(patch.object(place, name, new))
        stack.enter_context(Operations())
        stack.enter_context(FUNCTIONS)
        yield recorder
