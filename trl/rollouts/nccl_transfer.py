"""Send weights to vLLM over NCCL, from the trainer's main process to all workers of each server.

    once      POST /init_weight_transfer_engine ∥ join the group       ranks: the trainer 0, workers 1 … world size of the server
    update    POST /pause ▶ POST /start_weight_update
              POST /update_weights (names, types, shapes) ∥ broadcast of packed bytes, layer after layer
              POST /finish_weight_update (version) ▶ POST /reset_prefix_cache ▶ POST /resume

Each server has its own NCCL group, so that the failure of one does not affect the others. A server that fails during an
update has weights of two versions: it stays paused until it has received a complete version. Needs vLLM 0.30 or later, started
with `trl vllm-serve --nccl`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor, nn

from trl.errors import EngineError
from trl.models.gathering import gathered_parameters
from trl.rollouts.connection import Refused, Server, Unreachable
from trl.rollouts.nccl import Communicator, NCCLCommunicator, wait_for
from trl.rollouts.packing import WeightMeta, packed, update_info, weights_meta
from trl.rollouts.weight_sync import raise_everywhere
from trl.rollouts.weight_transfer import check_failures, for_all, forget_prompts
from trl.training.collectives import is_main

BUFFER_BYTES = 256 * 2**20
"""Size in bytes from which a buffer is sent."""

BUFFERS = 2
"""Number of buffers in memory: one is sent while the next is filled."""


class NCCLTransfer:
    """A `WeightTransfer` over NCCL. `timeout` is in seconds: for joining the group, for each buffer, and for each request."""

    def __init__(
        self,
        timeout: float,
        make_communicator: Callable[[], Communicator] = NCCLCommunicator,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self.timeout, self.make_communicator, self.buffer_bytes = timeout, make_communicator, buffer_bytes
        self.groups: dict[str, Communicator] = {}
        self._metas: list[WeightMeta] = []
        self._updates: dict[str, Future[Any]] = {}
        self._lost: set[str] = set()

    def send(self, servers: Sequence[Server], model: nn.Module, step: int) -> None:
        self._metas = self._metas or weights_meta(model)
        weights = gathered_parameters(model)
        failed: BaseException | None = None
        if is_main():
            try:
                self._send(servers, weights, str(step))
            except Exception as error:  # raised below, on all processes
                failed = error
        for _ in weights:  # gathering is collective: on other processes, and after a failure, go through all weights
            pass
        raise_everywhere(failed)

    def _send(self, servers: Sequence[Server], weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        left = _Remaining(servers, self._drop)
        fresh = [server for server in servers if server.url not in self.groups]
        self.groups |= {server.url: self.make_communicator() for server in fresh}
        left.each(self._join, fresh)
        left.each(self._begin)
        sent = None  # keeps the last buffer alive until it has arrived
        for buffer in self._buffers(left.servers, weights):
            left.one_by_one(self._wait)
            left.one_by_one(lambda server, buffer=buffer: self.groups[server.url].broadcast(buffer))
            sent = buffer
        left.one_by_one(self._wait)
        del sent
        left.each(lambda server: self._finish(server, version))
        check_failures(left.failures, servers, version)

    def _buffers(self, servers: Sequence[Server], weights: Iterable[tuple[str, Tensor]]) -> Iterable[Tensor]:
        if not servers:
            return ()
        return packed(weights, self._metas, self.buffer_bytes, self.groups[servers[0].url].device)

    def _join(self, server: Server) -> None:
        """Form the NCCL group of the trainer and this server's workers; the two sides wait for each other."""
        if server.url in self._lost:
            server.post("/shutdown_weight_transfer_engine")
            self._lost.discard(server.url)
        group = self.groups[server.url]
        size = 1 + int(server.get("/get_world_size", include_dp="true")["world_size"])
        info = join_info(group.unique_id, size, self.buffer_bytes)
        both = [
            _in_background(lambda: server.post("/init_weight_transfer_engine", {"init_info": info})),
            _in_background(lambda: group.connect(size)),
        ]
        try:
            there = wait_for(
                lambda: all(each.done() for each in both), timeout=self.timeout, check=lambda: _raise_failed(both)
            )
            _raise_failed(both)
        except (Refused, Unreachable) as error:
            raise type(error)(f"{error} Was the server started with `trl vllm-serve --nccl`?") from error
        if not there:
            raise Unreachable(
                f"POST {server.url}/init_weight_transfer_engine: trainer and server have not connected over NCCL within "
                f"{self.timeout:g} seconds. Can they reach each other over the network (NCCL_SOCKET_IFNAME)?"
            )

    def _begin(self, server: Server) -> None:
        server.version = None
        server.post("/pause", mode="keep")
        server.post("/start_weight_update")
        body = {"update_info": update_info(self._metas)}
        self._updates[server.url] = _in_background(lambda: server.post("/update_weights", body))

    def _wait(self, server: Server) -> None:
        """Wait until the last broadcast has arrived. Raises Unreachable after `timeout` seconds."""
        update = self._updates[server.url]
        if not wait_for(self.groups[server.url].is_done, timeout=self.timeout, check=lambda: _raise_failed([update])):
            raise Unreachable(
                f"POST {server.url}/update_weights: weights sent over NCCL have not arrived within {self.timeout:g} seconds."
            )

    def _finish(self, server: Server, version: str) -> None:
        update = self._updates.pop(server.url)
        wait_for(update.done, timeout=self.timeout, check=lambda: None)
        if not update.done():
            raise Unreachable(f"POST {server.url}/update_weights: no answer within {self.timeout:g} seconds.")
        update.result()
        server.post("/finish_weight_update", {"weight_version": version})
        forget_prompts(server)
        server.post("/resume")
        server.version = version

    def _drop(self, server: Server) -> None:
        server.version = None
        self._lost.add(server.url)
        self._updates.pop(server.url, None)
        self.groups.pop(server.url).abort()

    def close(self) -> None:
        """Leave all groups."""
        for group in self.groups.values():
            group.abort()
        self.groups = {}


def join_info(unique_id: str, world_size: int, buffer_bytes: int) -> dict[str, Any]:
    """The `init_info` for vLLM's route `/init_weight_transfer_engine`."""
    return {
        "nccl_unique_id_b64": unique_id,
        "rank_offset": 1,
        "world_size": world_size,
        "packed": True,
        "packed_buffer_size_bytes": buffer_bytes,
        "packed_num_buffers": BUFFERS,
    }


class _Remaining:
    """The servers on which every step of the transfer has succeeded so far, and the errors of the others."""

    def __init__(self, servers: Sequence[Server], drop: Callable[[Server], None]) -> None:
        self.servers, self.drop = list(servers), drop
        self.failures: list[BaseException] = []

    def each(self, act: Callable[[Server], Any], servers: Sequence[Server] | None = None) -> None:
        """Run `act` for all remaining servers (or for `servers`) concurrently; drop those where it fails."""
        self._judge(for_all(self.servers if servers is None else servers, act))

    def one_by_one(self, act: Callable[[Server], Any]) -> None:
        """Run `act` for the remaining servers one after the other, in this thread, which uses the CUDA device."""
        errors: dict[str, BaseException] = {}
        for server in self.servers:
            try:
                act(server)
            except EngineError as error:
                errors[server.url] = error
        self._judge(errors)

    def _judge(self, errors: dict[str, BaseException]) -> None:
        for server in [server for server in self.servers if server.url in errors]:
            self.servers.remove(server)
            self.failures.append(errors[server.url])
            self.drop(server)
        for error in errors.values():
            if not isinstance(error, Unreachable):
                raise error


def _in_background(act: Callable[[], Any]) -> Future[Any]:
    """Run `act()` in a daemon thread, which does not keep the interpreter from exiting, and return its future result."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _raise_failed(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        if future.done():
            future.result()
