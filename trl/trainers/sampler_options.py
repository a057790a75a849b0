"""Options that choose the rollout engine: the model itself, vLLM in the trainer's processes, or servers.

use_vllm=False                          LocalEngine: the model itself
use_vllm=True, vllm_mode="colocate"     VLLMEngine: vLLM in the trainer's processes
use_vllm=True, vllm_mode="server"       ServerEngine: `vllm serve`, or `trl serve` without vLLM
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from trl.errors import ConfigError, MissingPackageError
from trl.imports import is_available

if TYPE_CHECKING:
    from torch import nn

    from trl.rollouts.engine import RolloutEngine

PREFIX = ("vllm_", "rollout_")

USED = {
    "server": {
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "rollout_sync",
        "rollout_sync_dir",
        "rollout_request_timeout",
    },
    "colocate": {
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "rollout_sync_dir",
    },
}
"""Options that each mode reads."""

UNREAD = {"vllm_group_port": "(a folder needs no port, and NCCL chooses one itself)"}
"""Options that no mode reads, and why."""

ANYWHERE = ("0.0.0.0", "::")
"""Addresses by which a server listens on all interfaces; a client on the same machine connects to 127.0.0.1."""


@dataclass(kw_only=True)
class SamplerOptions:
    """Options of the rollout engine: see this module."""

    use_vllm: bool = False
    """Sample with vLLM, in the trainer's processes or on servers (`vllm_mode`)."""

    vllm_mode: Literal["colocate", "server"] = "colocate"
    """"server": separate servers (`trl vllm-serve` or `trl serve`), in any environment and on any machine. "colocate": vLLM
    in the trainer's own processes, on the same devices."""

    vllm_server_base_url: list[str] | str | None = None
    """URL of the server, or of several that share the prompts. None: made of vllm_server_host and vllm_server_port."""

    vllm_server_host: str = "0.0.0.0"
    """Host of the server; "0.0.0.0" is this machine."""

    vllm_server_port: int = 8000
    """Port of the server."""

    vllm_server_timeout: float = 240.0
    """Seconds to wait for the servers to start."""

    vllm_group_port: int = 51216
    """Has no effect, and warns if it is set: weights are sent through a folder, or over NCCL (`rollout_sync`), which
    chooses its port itself."""

    vllm_gpu_memory_utilization: float = 0.3
    """Fraction of GPU memory for vLLM, weights and KV cache together, with vllm_mode="colocate"."""

    vllm_max_model_length: int | None = None
    """Most tokens of a prompt with its completion, with vllm_mode="colocate". None: the model's context length."""

    vllm_tensor_parallel_size: int = 1
    """Number of processes over which vLLM splits the model's weights, with vllm_mode="colocate"."""

    vllm_model_impl: str = "vllm"
    """Implementation of the model, "vllm" or "transformers", with vllm_mode="colocate"."""

    vllm_enable_sleep_mode: bool = False
    """Put vLLM to sleep during optimizer steps: its weights move to host memory, and its KV cache is freed."""

    vllm_structured_outputs_regex: str | None = None
    """Not available: completions cannot be constrained to a regular expression."""

    rollout_sync: Literal["folder", "nccl"] = "folder"
    """How weights are sent to servers: "folder", through `rollout_sync_dir`, works with any server; "nccl", from GPU to
    GPU, needs `trl vllm-serve --nccl`, and has only been tested without GPUs."""

    rollout_sync_dir: str | None = None
    """Folder for weights that the trainer and all servers can read. None: shared memory, with all on one machine."""

    rollout_request_timeout: float = 600.0
    """Seconds that a server may take for a request, or for loading weights, before a retry."""

    def check_sampler(self) -> None:
        """Raises ConfigError for options of vLLM that are not available; warns of those that the chosen mode does not read."""
        if not self.use_vllm:
            return
        if self.vllm_structured_outputs_regex is not None:
            raise ConfigError(
                f"vllm_structured_outputs_regex={self.vllm_structured_outputs_regex!r} is not available in this version: leave "
                "it out. Completions that are constrained to an expression do not follow the policy's distribution."
            )
        own = [f for f in fields(SamplerOptions) if f.name.startswith(PREFIX) and f.name != "vllm_mode"]
        for field in own:
            if field.name not in USED[self.vllm_mode] and getattr(self, field.name) != field.default:
                why = UNREAD.get(field.name, f"with vllm_mode={self.vllm_mode!r}")
                warnings.warn(
                    f"{field.name}={getattr(self, field.name)} has no effect {why}: leave it out.", stacklevel=4
                )

    def check_installed(self) -> None:
        """Raises MissingPackageError if vllm_mode="colocate" needs vLLM and it is not installed."""
        if self.use_vllm and self.vllm_mode == "colocate" and not is_available("vllm"):
            raise MissingPackageError(
                'use_vllm=True with vllm_mode="colocate" needs vllm in this environment: pip install "trl[vllm]". Or leave use_vllm '
                'out, to sample from the model itself; or set vllm_mode="server", and start `trl vllm-serve` or `trl serve`.'
            )

    @property
    def server_urls(self) -> list[str]:
        """The servers that share the prompts."""
        given = self.vllm_server_base_url
        if given is not None:
            return [given] if isinstance(given, str) else list(given)
        host = "127.0.0.1" if self.vllm_server_host in ANYWHERE else self.vllm_server_host
        return [f"http://{host}:{self.vllm_server_port}"]

    def make_sampler(self, model: nn.Module, processor: Any, *, temperature: float, progress: bool) -> RolloutEngine:
        """Create the engine that these options describe. Raises ImportError if it needs vLLM, which is not installed.

        processor   the tokenizer, or the processor of a model that reads images
        """
        from trl.models.load import tokenizer_of

        tokenizer = None if processor is None else tokenizer_of(processor)
        if not self.use_vllm:
            from trl.rollouts.local import LocalEngine

            return LocalEngine(model, tokenizer, progress=progress)
        if self.vllm_mode == "server":
            from trl.rollouts.server import ServerEngine

            return ServerEngine(
                self.server_urls,
                tokenizer,
                sync_by=self.rollout_sync,
                sync_dir=self.rollout_sync_dir,
                timeout=self.rollout_request_timeout,
                start_timeout=self.vllm_server_timeout,
            )
        from trl.rollouts.vllm import VLLMEngine

        return VLLMEngine(
            processor,
            sync_dir=self.rollout_sync_dir,
            temperature=temperature,
            tensor_parallel_size=self.vllm_tensor_parallel_size,
            gpu_memory_utilization=self.vllm_gpu_memory_utilization,
            max_model_len=self.vllm_max_model_length,
            model_impl=self.vllm_model_impl,
            enable_sleep_mode=self.vllm_enable_sleep_mode,
        )
