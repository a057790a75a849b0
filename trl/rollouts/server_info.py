"""A rollout server's description of itself, from vLLM's route `/server_info`: its model, limits and log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl.rollouts.logprob_modes import tells_policy
from trl.rollouts.sampling import SamplingParams

SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
"""Sizes in which two models with the same vocabulary usually differ."""


@dataclass(frozen=True)
class ServerInfo:
    """A server's description of itself; None for values that it does not give."""

    model: str
    logprobs_mode: str
    dtype: str | None
    context: int | None
    vocabulary: int | None
    max_lora_rank: int | None
    takes_adapters: bool
    is_own: bool
    """Whether it is `trl serve`, which gives the same samples for a request as the engine in process."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """The values of `SIZES` that it gives."""

    def tells_policy(self, params: SamplingParams) -> bool:
        return tells_policy(self.logprobs_mode, params)


def read_info(found: Mapping[str, Any], model: str) -> ServerInfo:
    """Parse the answer of `/server_info`. vLLM gives values that are not JSON as text."""
    config = found["vllm_config"]
    about, lora = config["model_config"], config.get("lora_config")
    rank = lora.get("max_lora_rank") if isinstance(lora, Mapping) else None
    told = _config(about.get("hf_text_config") or about.get("hf_config"))
    return ServerInfo(
        model=model,
        logprobs_mode=str(about["logprobs_mode"]).rpartition(".")[2],
        dtype=str(about["dtype"]).removeprefix("torch.") if about.get("dtype") else None,
        context=about.get("max_model_len"),
        vocabulary=told.get("vocab_size"),
        max_lora_rank=None if rank is None else int(rank),
        takes_adapters=bool(lora) and lora != "None",
        is_own="trl_version" in found,
        sizes={name: told[name] for name in SIZES if isinstance(told.get(name), int)},
    )


def _config(config: Any) -> Mapping[str, Any]:
    """The text model's configuration, from a mapping, or from text "LlamaConfig {…}", which leaves out default values."""
    if isinstance(config, str):
        try:
            config = json.loads(config[config.index("{") :])
        except ValueError:
            return {}
    return config.get("text_config") or config if isinstance(config, Mapping) else {}
