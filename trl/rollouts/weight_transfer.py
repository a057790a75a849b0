"""How weights get to servers: through a folder that they read, or over NCCL (`trl.rollouts.nccl_transfer`).

    every server: pause ──▶ new weights ──▶ forget the cache of prompts ──▶ version ──▶ resume

A server that cannot be reached is left out until the next weights; with the last one, the transfer has failed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from trl.errors import EngineError
from trl.rollouts.connection import Refused, Server, Unreachable
from trl.rollouts.dispatch import Retries
from trl.rollouts.weight_folders import WeightFolders, default_root
from trl.rollouts.weight_sync import publish, write_adapter, write_weights
from trl.training.collectives import is_main, run_on_main

logger = logging.getLogger(__name__)

ADAPTER = "trl-policy"
"""Name under which servers keep the policy's adapter."""


class WeightTransfer(Protocol):
    """Sends the policy's weights, adapters merged, to servers."""

    def send(self, servers: Sequence[Server], model: nn.Module, step: int) -> None:
        """All processes call, and those servers that took the weights have `version` = `step` on the main one.

        Raises EngineError on all processes where no server took them, or one refused.
        """
        ...

    def close(self) -> None:
        """Give back what is held for the transfer."""
        ...


class FolderTransfer:
    """Weights, or an adapter alone, in a folder that this machine and all servers see: a `WeightTransfer`.

    root   where the folder is made. None: in shared memory
    """

    def __init__(self, root: Path | None, retries: Retries) -> None:
        self.root, self.retries = root, retries
        self.folders: WeightFolders | None = None

    def send(self, servers: Sequence[Server], model: nn.Module, step: int) -> None:
        self._publish(servers, model, step, write_weights, reload)

    def send_adapter(self, servers: Sequence[Server], model: nn.Module, step: int) -> None:
        """Send the adapter alone; servers sample with it under the name `ADAPTER`."""
        self._publish(servers, model, step, write_adapter, load_adapter)

    def _publish(
        self,
        servers: Sequence[Server],
        model: nn.Module,
        step: int,
        write: Callable[[nn.Module, Path | None], None],
        read: Callable[[Server, Path], None],
    ) -> None:
        if is_main():
            self.folders = self.folders or WeightFolders(self.root or default_root())
        folder = publish(self.folders, model, step, write)
        run_on_main(lambda: self._send_all(servers, read, folder, str(step)))

    def _send_all(
        self, servers: Sequence[Server], read: Callable[[Server, Path], None], folder: Path, version: str
    ) -> None:
        def exchange(server: Server) -> None:
            with exchanging(server, version):
                read(server, folder)

        failures: list[BaseException] = []
        for attempt in range(self.retries.most + 1):
            failures = [*together([server for server in servers if server.version != version], exchange).values()]
            raise_unless_unreachable(failures)
            if len(failures) < len(servers) or attempt == self.retries.most:
                break
            rest = self.retries.backoff * 2**attempt
            logger.warning("No server has taken the weights yet; once more in %g s: %s", rest, failures[0])
            time.sleep(rest)
        check_some_left(failures, servers, version)
        self.folders.keep_only(folder)

    def close(self) -> None:
        if self.folders is not None:
            self.folders.close()
        self.folders = None


@contextmanager
def exchanging(server: Server, version: str) -> Iterator[None]:
    """Within it the server samples nothing, and its weights are exchanged; afterwards it has this version."""
    server.version = None
    server.post("/pause", mode="keep")
    try:
        yield
        server.post("/update_weight_version", {"new_version": version})
    finally:
        server.post("/resume")
    server.version = version


def reload(server: Server, folder: Path) -> None:
    """Have the server read all weights from `folder`."""
    options = {"weights_path": str(folder), "is_checkpoint_format": True}
    try:
        server.post("/collective_rpc", {"method": "reload_weights", "kwargs": options})
    except Refused as error:
        raise EngineError(f"{error} Does the server see the folder {folder}?") from error
    forget_prompts(server)


def load_adapter(server: Server, folder: Path) -> None:
    """Have the server read the adapter in `folder`, in place of the one before."""
    body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
    try:
        server.post("/v1/load_lora_adapter", body)
    except Refused as error:
        raise EngineError(
            f"{error} vLLM takes adapters while it runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment. Does the "
            f"server see the folder {folder}?"
        ) from error


def forget_prompts(server: Server) -> None:
    """Have the server drop what earlier weights computed: keys and values, and features of images."""
    answer = server.post("/reset_prefix_cache", reset_running_requests="true")
    done = answer.get("success") is True if isinstance(answer, Mapping) else answer == ""
    if not done:
        raise Unreachable(
            f"POST {server.url}/reset_prefix_cache: the server did not forget what it had cached of prompts, which belongs to "
            "earlier weights."
        )
    if server.reads_images:
        server.post("/reset_encoder_cache")


def raise_unless_unreachable(errors: Sequence[BaseException]) -> None:
    """Raise the first error after which asking another server, or later, is no use."""
    for error in errors:
        if not isinstance(error, Unreachable):
            raise error


def check_some_left(failures: Sequence[BaseException], servers: Sequence[Server], version: str) -> None:
    """Say which servers failed. Raises EngineError where all did."""
    if len(failures) == len(servers):
        reasons = "\n".join(map(str, failures))
        raise EngineError(f"No server has taken the weights of step {version}:\n{reasons}")
    for error in failures:
        logger.warning("%s The other servers go on without it.", error)


def together(servers: Sequence[Server], act: Callable[[Server], Any]) -> dict[str, BaseException]:
    """The errors of `act(server)`, done for all servers at the same time, by URL."""
    if not servers:
        return {}
    with ThreadPoolExecutor(len(servers)) as pool:
        futures = {server.url: pool.submit(act, server) for server in servers}
    return {url: error for url, future in futures.items() if (error := future.exception()) is not None}
