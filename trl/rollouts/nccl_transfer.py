"""Weights that travel to vLLM over NCCL, from the trainer's main process to all workers of each server.

    once      POST /init_weight_transfer_engine ∥ join the group       ranks: the trainer 0, workers 1 … world size of the server
    update    POST /pause ▶ POST /start_weight_update
              POST /update_weights (names, types, shapes) ∥ broadcast of packed bytes, layer after layer
              POST /finish_weight_update (version) ▶ POST /reset_prefix_cache ▶ POST /resume

Each server has a group of its own, so that one that is lost takes no other with it. One that fails in the middle holds parts of
two versions: it stays paused until it has taken the next one as a whole. Servers are those of vLLM 0.30 or later, started with
`trl vllm-serve --nccl`.
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
from trl.rollouts.weight_transfer import check_some_left, forget_prompts, together
from trl.training.collectives import is_main

BUFFER_BYTES = 256 * 2**20
"""Bytes after which a buffer is sent."""

BUFFERS = 2
"""Buffers alive at a time: one on its way while the next is filled."""


class NCCLTransfer:
    """A `WeightTransfer`. `timeout`: seconds for joining, for each buffer, and for each request."""

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
        for _ in weights:  # the other processes wait for this one's part in every layer
            pass
        raise_everywhere(failed)

    def _send(self, servers: Sequence[Server], weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        left = _Left(servers, self._drop)
        fresh = [server for server in servers if server.url not in self.groups]
        self.groups |= {server.url: self.make_communicator() for server in fresh}
        left.each(self._join, fresh)
        left.each(self._begin)
        sent = None  # holds a buffer until it has arrived
        for buffer in self._buffers(left.servers, weights):
            left.one_by_one(self._wait)
            left.one_by_one(lambda server, buffer=buffer: self.groups[server.url].broadcast(buffer))
            sent = buffer
        left.one_by_one(self._wait)
        del sent
        left.each(lambda server: self._finish(server, version))
        check_some_left(left.failures, servers, version)

    def _buffers(self, servers: Sequence[Server], weights: Iterable[tuple[str, Tensor]]) -> Iterable[Tensor]:
        if not servers:
            return ()
        return packed(weights, self._metas, self.buffer_bytes, self.groups[servers[0].url].device)

    def _join(self, server: Server) -> None:
        """Form the group of the trainer and this server's workers; both sides wait for each other."""
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
            raise type(error)(f"{error} Is the server started with `trl vllm-serve --nccl`?") from error
        if not there:
            raise Unreachable(
                f"POST {server.url}/init_weight_transfer_engine: trainer and server have not met over NCCL within "
                f"{self.timeout:g} seconds. Do they see each other's network (NCCL_SOCKET_IFNAME)?"
            )

    def _begin(self, server: Server) -> None:
        server.version = None
        server.post("/pause", mode="keep")
        server.post("/start_weight_update")
        body = {"update_info": update_info(self._metas)}
        self._updates[server.url] = _in_background(lambda: server.post("/update_weights", body))

    def _wait(self, server: Server) -> None:
        """Until what was broadcast last has arrived."""
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
    """What vLLM's route `/init_weight_transfer_engine` is told."""
    return {
        "nccl_unique_id_b64": unique_id,
        "rank_offset": 1,
        "world_size": world_size,
        "packed": True,
        "packed_buffer_size_bytes": buffer_bytes,
        "packed_num_buffers": BUFFERS,
    }


class _Left:
    """The servers that have done every step so far, and why others have not."""

    def __init__(self, servers: Sequence[Server], drop: Callable[[Server], None]) -> None:
        self.servers, self.drop = list(servers), drop
        self.failures: list[BaseException] = []

    def each(self, act: Callable[[Server], Any], servers: Sequence[Server] | None = None) -> None:
        """A step of all servers at the same time, or of some of them."""
        self._judge(together(self.servers if servers is None else servers, act))

    def one_by_one(self, act: Callable[[Server], Any]) -> None:
        """A step that has to be done by this thread, whose device it is."""
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
    """The result of `act()`, by a thread that nobody has to wait for."""
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
