"""`trl vllm-serve`: start vLLM's own server with the flags that a trainer needs, and print the command.

trl vllm-serve --model Qwen/Qwen2.5-0.5B-Instruct
trl vllm-serve --model Qwen/Qwen2.5-0.5B-Instruct --vllm /envs/vllm/bin/vllm --port 8001 --max_lora_rank 32

vLLM may be installed in a separate environment, since the trainer talks to it only over HTTP.
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
"""vLLM offers the routes that update weights only in this mode."""

ADAPTERS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""Lets a running server load adapters."""

NCCL = '{"backend": "nccl"}'


PASSED_ON = (
    *("host", "port", "revision", "tensor_parallel_size", "gpu_memory_utilization", "dtype", "max_model_len"),
    *("kv_cache_dtype", "distributed_executor_backend", "speculative_config", "logprobs_mode", "max_lora_rank"),
)
"""Options that have the same name in vLLM."""


@dataclass(kw_only=True)
class VLLMServeArguments:
    """Options of `trl vllm-serve`."""

    ALIASES: ClassVar[dict[str, str]] = {"model_name_or_path": "model", "tp": "tensor_parallel_size"}

    model: str
    """Name or folder of the model."""

    vllm: str = "vllm"
    """Program to start; a path if vLLM is installed in a separate environment."""

    host: str = "127.0.0.1"
    """Address to listen on. Anyone who can reach it can replace the weights: see --api-key of vLLM."""

    port: int = 8000
    """Port to listen on."""

    revision: str | None = None
    """Revision of the model on the hub."""

    tensor_parallel_size: int = 1
    """Number of devices that the weights are sharded over."""

    data_parallel_size: int = 1
    """Replicas behind one address: not available above 1, since new weights would reach only one of them. Start several
    servers instead, and give their URLs to the trainer."""

    gpu_memory_utilization: float = 0.9
    """Fraction of each device's memory that vLLM uses."""

    dtype: str = "auto"
    """Precision of the weights. That of the trainer's model keeps log-probabilities closest to the trainer's."""

    max_model_len: int | None = None
    """Maximum tokens of prompt and completion together. None: the model's context length."""

    enable_prefix_caching: bool | None = None
    """Reuse the KV cache of prompts with a common prefix. None: vLLM's default."""

    enforce_eager: bool = False
    """Run without CUDA graphs."""

    kv_cache_dtype: str = "auto"
    """Precision of the KV cache."""

    trust_remote_code: bool = False
    """Run Python code from the model's repository."""

    log_level: str = "info"
    """Log level of the server: debug, info, warning, error."""

    vllm_model_impl: str = "vllm"
    """Implementation of the model: "vllm" or "transformers"."""

    distributed_executor_backend: str | None = None
    """Backend that runs the processes of several devices: "mp" or "ray". None: vLLM's default."""

    speculative_config: str | None = None
    """Speculative decoding, as JSON."""

    logprobs_mode: str = "processed_logprobs"
    """Which log-probabilities the server returns. "processed_logprobs": the policy's at any temperature, if sampling is
    not truncated; "raw_logprobs": the policy's at temperature 1, with or without truncation."""

    nccl: bool = False
    """Receive weights over NCCL, as trainers with rollout_sync="nccl" send them."""

    max_lora_rank: int | None = None
    """Accept LoRA adapters up to this rank, so that training sends only the adapter. None: training sends merged
    weights."""


def run(arguments: VLLMServeArguments, given: ParsedOptions) -> int:
    command, variables = [*command_of(arguments), *given.rest], environment_of(arguments)
    program = shutil.which(arguments.vllm)
    if program is None:
        raise ConfigError(
            f"There is no program {arguments.vllm!r}. To install vLLM in a separate environment: `python -m venv vllm-env`, "
            "`vllm-env/bin/pip install vllm`, and --vllm vllm-env/bin/vllm. Without vLLM: `trl serve`."
        )
    print(shlex.join([*(f"{k}={v}" for k, v in variables.items()), *command]), flush=True)
    return os.execve(program, command, {**os.environ, **variables, **given.environment})


def environment_of(arguments: VLLMServeArguments) -> Mapping[str, str]:
    """Environment variables for the server."""
    return {**DEVELOPER, **(ADAPTERS if arguments.max_lora_rank else {})}


def command_of(arguments: VLLMServeArguments) -> list[str]:
    """The command line of `vllm serve`. Raises ConfigError for several replicas, since weights would reach only one."""
    if arguments.data_parallel_size != 1:
        raise ConfigError(
            f"data_parallel_size={arguments.data_parallel_size}: start that many servers, each on its own port, and give their "
            "URLs to the trainer (vllm_server_base_url), which then updates the weights of all."
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
    switches["enable-scale-out"] = True  # enables the route that accepts token ids and images
    switches["enable-lora"] = arguments.max_lora_rank is not None
    return command + [f"--{name}" for name, on in switches.items() if on]
