"""Send weights to servers through a folder that they read; `trl.rollouts.nccl_transfer` sends them over NCCL.

    every server: pause ──▶ load weights ──▶ reset the prefix cache ──▶ set the version ──▶ resume

A server that cannot be reached is left out until the next transfer; if none can be reached, the transfer fails.
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
"""Name under which servers load the policy's adapter."""


class WeightTransfer(Protocol):
    """Sends the policy's weights, adapters merged, to servers."""

    def send(self, servers: Sequence[Server], model: nn.Module, step: int) -> None:
        """Send the weights; a collective call. On the main process, servers that loaded them then have `version` = `step`.

        Raises EngineError on all processes if no server loaded them, or one refused.
        """
        ...

    def close(self) -> None:
        """Release folders and connections of the transfer."""
        ...


class FolderTransfer:
    """A `WeightTransfer` of weights, or of an adapter alone, through a folder that this machine and all servers see.

    root   parent of that folder. None: shared memory
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
            failures = [*for_all([server for server in servers if server.version != version], exchange).values()]
            raise_unless_unreachable(failures)
            if len(failures) < len(servers) or attempt == self.retries.most:
                break
            rest = self.retries.backoff * 2**attempt
            logger.warning("No server has loaded the weights yet; retrying in %g s: %s", rest, failures[0])
            time.sleep(rest)
        check_failures(failures, servers, version)
        self.folders.keep_only(folder)

    def close(self) -> None:
        if self.folders is not None:
            self.folders.close()
        self.folders = None


@contextmanager
def exchanging(server: Server, version: str) -> Iterator[None]:
    """Within it, sampling on the server is paused while its weights are replaced; afterwards it has version `version`."""
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
    """Have the server read the adapter in `folder`, in place of the previous one."""
    body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
    try:
        server.post("/v1/load_lora_adapter", body)
    except Refused as error:
        raise EngineError(
            f"{error} vLLM loads adapters at run time only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment. Does the "
            f"server see the folder {folder}?"
        ) from error


def forget_prompts(server: Server) -> None:
    """Have the server drop its prefix cache (keys and values) and its cached image features, which are of earlier weights."""
    answer = server.post("/reset_prefix_cache", reset_running_requests="true")
    done = answer.get("success") is True if isinstance(answer, Mapping) else answer == ""
    if not done:
        raise Unreachable(
            f"POST {server.url}/reset_prefix_cache: the server did not reset its prefix cache, which belongs to earlier weights."
        )
    if server.reads_images:
        server.post("/reset_encoder_cache")


def raise_unless_unreachable(errors: Sequence[BaseException]) -> None:
    """Raise the first error, if any, for which a retry or another server cannot help."""
    for error in errors:
        if not isinstance(error, Unreachable):
            raise error


def check_failures(failures: Sequence[BaseException], servers: Sequence[Server], version: str) -> None:
    """Log which servers failed. Raises EngineError if all did."""
    if len(failures) == len(servers):
        reasons = "\n".join(map(str, failures))
        raise EngineError(f"No server has loaded the weights of step {version}:\n{reasons}")
    for error in failures:
        logger.warning("%s Sampling continues on the other servers.", error)


def for_all(servers: Sequence[Server], act: Callable[[Server], Any]) -> dict[str, BaseException]:
    """Run `act(server)` for all servers concurrently, and return the errors by URL."""
    if not servers:
        return {}
    with ThreadPoolExecutor(len(servers)) as pool:
        futures = {server.url: pool.submit(act, server) for server in servers}
    return {url: error for url, future in futures.items() if (error := future.exception()) is not None}
