"""`trl vllm-serve`: start vLLM's own server with the flags that a trainer needs, and say which they are.

trl vllm-serve --model Qwen/Qwen2.5-0.5B-Instruct
trl vllm-serve --model Qwen/Qwen2.5-0.5B-Instruct --vllm /envs/vllm/bin/vllm --port 8001 --max_lora_rank 32

vLLM may live in an environment of its own, since the trainer talks to it over HTTP alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from trl.cli.parser import ParsedOptions
from trl.errors import ConfigError

DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}
"""The routes by which weights are exchanged are there in this mode alone."""

ADAPTERS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""Lets a running server take adapters."""

NCCL = '{"backend": "nccl"}'


PASSED_ON = (
    *("host", "port", "revision", "tensor_parallel_size", "gpu_memory_utilization", "dtype", "max_model_len"),
    *("kv_cache_dtype", "distributed_executor_backend", "speculative_config", "logprobs_mode", "max_lora_rank"),
)
"""Options that vLLM calls so, too."""


@dataclass(kw_only=True)
class VLLMServeArguments:
    """Options of `trl vllm-serve`."""

    ALIASES: ClassVar[dict[str, str]] = {"model_name_or_path": "model", "tp": "tensor_parallel_size"}

    model: str
    """Name or folder of the model."""

    vllm: str = "vllm"
    """The program to start; its path, where vLLM has an environment of its own."""

    host: str = "127.0.0.1"
    """Address to listen at. Whoever reaches it can exchange the weights: see --api-key of vLLM."""

    port: int = 8000
    """Port to listen at."""

    revision: str | None = None
    """Revision of the model on the hub."""

    tensor_parallel_size: int = 1
    """Devices that share one copy of the weights."""

    data_parallel_size: int = 1
    """Copies behind one address: not available, since weights would reach one of them. Start several servers instead, and give
    their URLs to the trainer."""

    gpu_memory_utilization: float = 0.9
    """Share of a device's memory that vLLM takes."""

    dtype: str = "auto"
    """Precision of the weights. The trainer's own keeps log-probabilities closest."""

    max_model_len: int | None = None
    """Tokens of prompt and completion at most. None: the model's context."""

    enable_prefix_caching: bool | None = None
    """Keep the keys of prompts that begin alike. None: as vLLM does by itself."""

    enforce_eager: bool = False
    """Run without CUDA graphs."""

    kv_cache_dtype: str = "auto"
    """Precision of keys and values."""

    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""

    log_level: str = "info"
    """How much the server tells: debug, info, warning, error."""

    vllm_model_impl: str = "vllm"
    """Implementation of the model: "vllm" or "transformers"."""

    distributed_executor_backend: str | None = None
    """How devices work together: "mp" or "ray". None: as vLLM does by itself."""

    speculative_config: str | None = None
    """Speculative decoding, as JSON."""

    logprobs_mode: str = "processed_logprobs"
    """Which log-probabilities are told. "processed_logprobs": the policy's at every temperature, without truncation;
    "raw_logprobs": the policy's at temperature 1, whatever is truncated."""

    nccl: bool = False
    """Take weights over NCCL, as trainers with rollout_sync="nccl" send them."""

    max_lora_rank: int | None = None
    """Take adapters, up to this rank, so that the adapter alone is sent in training. None: the merged weights are sent."""


def run(arguments: VLLMServeArguments, given: ParsedOptions) -> int:
    command, variables = [*command_of(arguments), *given.rest], environment_of(arguments)
    program = shutil.which(arguments.vllm)
    if program is None:
        raise ConfigError(
            f"There is no program {arguments.vllm!r}. vLLM may have an environment of its own: `python -m venv vllm-env`, "
            "`vllm-env/bin/pip install vllm`, and --vllm vllm-env/bin/vllm. Without vLLM: `trl serve`."
        )
    print(shlex.join([*(f"{k}={v}" for k, v in variables.items()), *command]), flush=True)
    return os.execve(program, command, {**os.environ, **variables, **given.environment})


def environment_of(arguments: VLLMServeArguments) -> Mapping[str, str]:
    """The variables that the server is started with."""
    return {**DEVELOPER, **(ADAPTERS if arguments.max_lora_rank else {})}


def command_of(arguments: VLLMServeArguments) -> list[str]:
    """The command line of `vllm serve`. Raises ConfigError for copies that weights would not reach."""
    if arguments.data_parallel_size != 1:
        raise ConfigError(
            f"data_parallel_size={arguments.data_parallel_size}: start so many servers, each at a port of its own, and give their "
            "URLs to the trainer (vllm_server_base_url); weights then reach all of them."
        )
    valued = {name.replace("_", "-"): getattr(arguments, name) for name in PASSED_ON} | {
        "uvicorn-log-level": arguments.log_level,
        "model-impl": arguments.vllm_model_impl,
        "generation-config": "vllm",
        "weight-transfer-config": NCCL if arguments.nccl else None,
    }
    command = [arguments.vllm, "serve", arguments.model]
    command += [word for name, value in valued.items() if value is not None for word in (f"--{name}", str(value))]
    caching = {True: ["--enable-prefix-caching"], False: ["--no-enable-prefix-caching"], None: []}
    command += caching[arguments.enable_prefix_caching]
    switches = {"enforce-eager": arguments.enforce_eager, "trust-remote-code": arguments.trust_remote_code}
    switches["enable-scale-out"] = True  # the route that takes token ids and images
    switches["enable-lora"] = arguments.max_lora_rank is not None
    return command + [f"--{name}" for name, on in switches.items() if on]
