"""Reinforcement learning of language models in one call: the interface of trlX, implemented by the trainers of `trl`.

    import trlx
    trlx.train("gpt2", reward_fn=lambda samples, **kwargs: [s.count("cats") for s in samples])     # online: PPO
    trlx.train("gpt2", samples=["a", "b"], rewards=[1.0, 0.0])                                     # offline: ILQL
    trlx.train("gpt2", samples=[["question", "answer"]])                                           # fine-tuning

docs/coming_from_trlx.md lists the differences from trlX, with reasons.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["logging", "train"]

_MODULE_OF = {"train": "trlx.trlx", "logging": "trlx.utils"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'trlx' has no attribute {name!r}.")
    module = importlib.import_module(_MODULE_OF[name])
    value = importlib.import_module("trlx.utils.logging") if name == "logging" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
