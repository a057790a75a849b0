"""Options that say what samples: the model in process, vLLM in the same processes, or servers.

use_vllm=False                          LocalEngine: the model itself
use_vllm=True, vllm_mode="colocate"     VLLMEngine: vLLM in the trainer's processes
use_vllm=True, vllm_mode="server"       ServerEngine: `vllm serve`, or `trl serve` without vLLM
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from trl.errors import ConfigError
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
"""Addresses at which a server listens on every network; a client asks at this machine's own."""


@dataclass(kw_only=True)
class SamplerOptions:
    """What samples, and where: see this module."""

    use_vllm: bool = False
    """Sample with vLLM, in the trainer's processes or on servers (`vllm_mode`)."""

    vllm_mode: Literal["colocate", "server"] = "colocate"
    """"server": servers of their own, `trl vllm-serve` or `trl serve`, in any environment and on any machine. "colocate": vLLM in
    the trainer's own processes, on the same devices."""

    vllm_server_base_url: list[str] | str | None = None
    """URL of the server, or of several that share the prompts. None: as vllm_server_host and vllm_server_port say."""

    vllm_server_host: str = "0.0.0.0"
    """Host of the server; "0.0.0.0" is this machine."""

    vllm_server_port: int = 8000
    """Port of the server."""

    vllm_server_timeout: float = 240.0
    """Seconds that are waited for servers at the start."""

    vllm_group_port: int = 51216
    """Has no effect, which is said if it is given: weights travel through a folder, or over NCCL (`rollout_sync`), which
    chooses a port itself."""

    vllm_gpu_memory_utilization: float = 0.3
    """Share of a device's memory that vLLM takes, weights and keys together, with vllm_mode="colocate"."""

    vllm_max_model_length: int | None = None
    """Tokens of prompt and completion at most, with vllm_mode="colocate". None: the model's context."""

    vllm_tensor_parallel_size: int = 1
    """Processes that share one copy of the sampler's weights, with vllm_mode="colocate"."""

    vllm_model_impl: str = "vllm"
    """Implementation of the model, "vllm" or "transformers", with vllm_mode="colocate"."""

    vllm_enable_sleep_mode: bool = False
    """Put vLLM to sleep while the policy learns: its weights go to host memory, and its cache is given up."""

    vllm_structured_outputs_regex: str | None = None
    """Not available: completions are not held to an expression."""

    rollout_sync: Literal["folder", "nccl"] = "folder"
    """How weights get to servers: "folder", through `rollout_sync_dir`, to any server; "nccl", from GPU to GPU, to those of
    `trl vllm-serve --nccl`. The latter has been tried without GPUs alone."""

    rollout_sync_dir: str | None = None
    """Folder for weights that the trainer and all servers see. None: shared memory, where all are on one machine."""

    rollout_request_timeout: float = 600.0
    """Seconds that a server may take for one request, or for reading weights, before another try."""

    def check_sampler(self) -> None:
        """Raises ConfigError for options of vLLM that cannot be kept; says which ones the chosen mode does not read."""
        if not self.use_vllm:
            return
        if self.vllm_structured_outputs_regex is not None:
            raise ConfigError(
                f"vllm_structured_outputs_regex={self.vllm_structured_outputs_regex!r} is not available in this version: leave "
                "it out. Samples that are held to an expression are not the policy's."
            )
        own = [f for f in fields(SamplerOptions) if f.name.startswith(PREFIX) and f.name != "vllm_mode"]
        for field in own:
            if field.name not in USED[self.vllm_mode] and getattr(self, field.name) != field.default:
                why = UNREAD.get(field.name, f"with vllm_mode={self.vllm_mode!r}")
                warnings.warn(
                    f"{field.name}={getattr(self, field.name)} has no effect {why}: leave it out.", stacklevel=4
                )

    def check_installed(self) -> None:
        """Raises ConfigError where vLLM is to sample in process, and is not installed."""
        if self.use_vllm and self.vllm_mode == "colocate" and not is_available("vllm"):
            raise ConfigError(
                'use_vllm=True with vllm_mode="colocate" needs vllm in this environment: pip install "trl[vllm]". Or leave use_vllm '
                'out, and the model itself samples; or set vllm_mode="server", and start `trl vllm-serve` or `trl serve`.'
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
        """The engine that these options describe. Raises ImportError where vLLM is asked for and not installed.

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
