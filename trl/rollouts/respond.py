"""Shortcuts for sampling: responses with a fixed number of tokens, and random response lengths."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from trl.errors import ConfigError
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams


def respond_to_batch(
    model: nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Sample `txt_len` tokens after each query `[B,L]`, and return the sampled tokens `[B,txt_len]`.

    An end-of-sequence token does not end a response. All queries have the same length, without padding.
    """
    params = SamplingParams(max_new_tokens=txt_len, ignore_eos=True, top_k=int(top_k), top_p=top_p)
    rollouts = LocalEngine(model).generate([Prompt(query) for query in queries.tolist()], params)
    return torch.tensor([sample.ids for (sample,) in rollouts], device=queries.device)


class LengthSampler:
    """Draws a random length from min_value, …, max_value − 1 at each call."""

    def __init__(self, min_value: int, max_value: int) -> None:
        if not min_value < max_value:
            raise ConfigError(
                f"LengthSampler({min_value}, {max_value}): max_value is exclusive, so that no length is left; give a larger one."
            )
        self.values = range(min_value, max_value)

    def __call__(self) -> int:
        return random.choice(self.values)
