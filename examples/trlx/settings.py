"""Settings of the example scripts: default configurations, changes for the local task, and the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from trlx.data.default_configs import TRLConfig, default_ppo_config
from trlx.trainer.accelerate_rft_trainer import RFTConfig

Settings = Mapping[str, Any]
"""Changes of a configuration, by section or with dotted keys."""


def configuration(default: TRLConfig, local: Settings, hparams: Settings | None, *, model: str) -> TRLConfig:
    """`default` with `model` and its tokenizer, updated by `local`, and then by `hparams`."""
    named = {"model.model_path": model, "tokenizer.tokenizer_path": model, "train.tracker": None}
    for changes in (named, local, hparams or {}):
        default = TRLConfig.update(default, changes)
    return default


def constant_rate(rate: float) -> dict[str, float]:
    """Settings of a constant learning rate."""
    return {"optimizer.kwargs.lr": rate, "scheduler.kwargs.eta_min": rate}


def cosine(rate: float, steps: int) -> dict[str, float]:
    """Settings of a learning rate that decays to 1e-5 over `steps`."""
    return {"optimizer.kwargs.lr": rate, "scheduler.kwargs.T_max": steps, "scheduler.kwargs.eta_min": 1e-5}


def default_rft_config() -> TRLConfig:
    """Default configuration of rejection-sampling fine-tuning, for which trlX has none."""
    method = RFTConfig(gen_kwargs={"max_new_tokens": 40, "do_sample": True})
    default = TRLConfig.update(default_ppo_config(), {"train.trainer": "AccelerateRFTTrainer"})
    return TRLConfig.from_dict({**default.to_dict(), "method": method.to_dict()})


def from_command_line() -> dict[str, Any]:
    """Settings from the script's first argument, as JSON; empty without one."""
    return json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
