"""Rank 0 of an NCCL group, by the library that PyTorch has loaded: no process group of `torch.distributed`, no vLLM.

    id = ncclGetUniqueId() ──base64, over HTTP──▶ the other ranks          everyone: ncclCommInitRank, one all-reduce of one number
    broadcast(tensor)                                                      bytes from rank 0 to all

That one all-reduce is how vLLM's workers greet whoever joins them.
"""

from __future__ import annotations

import base64
import ctypes
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trl.errors import EngineError
from trl.rollouts.connection import Unreachable

UINT8, FLOAT32, SUM, ROOT = 1, 7, 0, 0
"""Numbers of `nccl.h`."""

ID_BYTES = 128
WAIT = 0.002
"""Seconds between two looks at what runs on the device."""


class Communicator(Protocol):
    """What sends bytes to the workers of one server."""

    unique_id: str
    """What the other ranks join by."""

    device: torch.device
    """Where what is sent has to be."""

    def connect(self, world_size: int) -> None:
        """Join; returns once all ranks have."""
        ...

    def broadcast(self, tensor: Tensor) -> None:
        """Begin to send a contiguous tensor of bytes, which is not to change until `is_done`."""
        ...

    def is_done(self) -> bool:
        """Whether what was sent has arrived."""
        ...

    def abort(self) -> None:
        """Leave the group, whatever is under way."""
        ...


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


class NCCLCommunicator:
    """A `Communicator` on the current CUDA device. Raises EngineError where NCCL is not there, or fails."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise EngineError(
                "Weights travel over NCCL between CUDA devices, and this process has none: leave out rollout_sync='nccl'; they "
                "then travel through a folder."
            )
        self._library = _load()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream, self._event = torch.cuda.Stream(), torch.cuda.Event()
        self._group = ctypes.c_void_p()
        self._id = _UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(self._id))
        self.unique_id = base64.b64encode(bytes(self._id)).decode()

    def connect(self, world_size: int) -> None:
        with torch.cuda.device(self.device):  # a thread begins on the first device
            self._call("ncclCommInitRank", ctypes.byref(self._group), world_size, self._id, ROOT)
            greeting = torch.zeros(1, device="cuda")
            self._stream.wait_stream(torch.cuda.current_stream())
            at = ctypes.c_void_p(greeting.data_ptr())
            self._call("ncclAllReduce", at, at, 1, FLOAT32, SUM, self._group, self._on_stream)
            self._stream.synchronize()

    def broadcast(self, tensor: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        at = ctypes.c_void_p(tensor.data_ptr())
        self._call("ncclBroadcast", at, at, tensor.numel(), UINT8, ROOT, self._group, self._on_stream)
        self._event.record(self._stream)

    def is_done(self) -> bool:
        return self._event.query()

    def abort(self) -> None:
        if self._group:
            self._library.ncclCommAbort(self._group)
            self._group = ctypes.c_void_p()

    @property
    def _on_stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._stream.cuda_stream)

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            words = self._library.ncclGetErrorString(result).decode()
            raise Unreachable(
                f"{name} of NCCL failed: {words}. Trainer and server need devices of their own, and a network between them "
                "(NCCL_SOCKET_IFNAME); NCCL_DEBUG=INFO says more."
            )


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise EngineError(f"NCCL is not there: {error}. Leave out rollout_sync='nccl'.") from error
    pointer, whole, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    for name, types in {
        "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
        "ncclCommInitRank": [ctypes.POINTER(pointer), whole, _UniqueId, whole],
        "ncclAllReduce": [pointer, pointer, size, whole, whole, pointer, pointer],
        "ncclBroadcast": [pointer, pointer, size, whole, whole, pointer, pointer],
        "ncclCommAbort": [pointer],
    }.items():
        getattr(library, name).argtypes = types
    library.ncclGetErrorString.argtypes = [whole]
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def wait_for(is_done: Callable[[], bool], *, timeout: float, check: Callable[[], None]) -> bool:
    """Whether `is_done` within so many seconds; `check` is called meanwhile, and raises where waiting is no use."""
    end = time.monotonic() + timeout
    while not is_done():
        check()
        if time.monotonic() > end:
            return False
        time.sleep(WAIT)
    return True
