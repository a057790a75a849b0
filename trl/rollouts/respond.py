"""Short ways to sample: a fixed number of tokens, and lengths drawn at random."""

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
    """Sample `txt_len` tokens after each query: `[B,L] -> [B,txt_len]`, the sampled tokens alone.

    An end-of-sequence token does not end a response. Queries are of one length, without padding.
    """
    params = SamplingParams(max_new_tokens=txt_len, ignore_eos=True, top_k=int(top_k), top_p=top_p)
    rollouts = LocalEngine(model).generate([Prompt(query) for query in queries.tolist()], params)
    return torch.tensor([sample.ids for (sample,) in rollouts], device=queries.device)


class LengthSampler:
    """Draws a length from min_value, …, max_value − 1 at each call."""

    def __init__(self, min_value: int, max_value: int) -> None:
        if not min_value < max_value:
            raise ConfigError(
                f"LengthSampler({min_value}, {max_value}): the maximum is exclusive, and no length is left."
            )
        self.values = range(min_value, max_value)

    def __call__(self) -> int:
        return random.choice(self.values)
