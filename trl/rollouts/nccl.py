"""Rank 0 of an NCCL communicator, by calling PyTorch's NCCL library directly, without `torch.distributed` and without vLLM.

    id = ncclGetUniqueId() ──base64, over HTTP──▶ the other ranks          all ranks: ncclCommInitRank, one all-reduce of one number
    broadcast(tensor)                                                      bytes from rank 0 to all

vLLM's workers run that all-reduce when they join, so rank 0 has to take part in it.
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
"""Constants from `nccl.h`, and the rank that broadcasts."""

ID_BYTES = 128
WAIT = 0.002
"""Seconds between two polls in `wait_for`."""


class Communicator(Protocol):
    """Broadcasts bytes to the workers of one server."""

    unique_id: str
    """Id with which the other ranks join."""

    device: torch.device
    """Device on which tensors to be sent have to be."""

    def connect(self, world_size: int) -> None:
        """Join; returns once all ranks have."""
        ...

    def broadcast(self, tensor: Tensor) -> None:
        """Start to send a contiguous tensor of bytes; it must not change until `is_done`."""
        ...

    def is_done(self) -> bool:
        """True once the last broadcast has finished."""
        ...

    def abort(self) -> None:
        """Leave the group at once, even during a broadcast."""
        ...


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


class NCCLCommunicator:
    """A `Communicator` on the current CUDA device. Raises EngineError if there is no CUDA device or NCCL, or NCCL fails."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise EngineError(
                "NCCL sends weights between CUDA devices, and this process has none: leave out rollout_sync='nccl' to send them "
                "through a folder."
            )
        self._library = _load()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream, self._event = torch.cuda.Stream(), torch.cuda.Event()
        self._group = ctypes.c_void_p()
        self._id = _UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(self._id))
        self.unique_id = base64.b64encode(bytes(self._id)).decode()

    def connect(self, world_size: int) -> None:
        with torch.cuda.device(self.device):  # in a new thread, the current device is 0
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
                f"{name} of NCCL failed: {words}. Trainer and server have to use different devices, with a network between them "
                "(NCCL_SOCKET_IFNAME); NCCL_DEBUG=INFO gives details."
            )


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise EngineError(f"NCCL cannot be loaded: {error}. Leave out rollout_sync='nccl'.") from error
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
    """Wait until `is_done`; return False after `timeout` seconds. `check` is called meanwhile, and may raise to stop waiting."""
    end = time.monotonic() + timeout
    while not is_done():
        check()
        if time.monotonic() > end:
            return False
        time.sleep(WAIT)
    return True
