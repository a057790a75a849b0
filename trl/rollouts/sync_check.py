"""Whether a sampler has the trainer's weights: both score the same few tokens.

    |log π_sampler(y) − log π_trainer(y)| per token      rounding where the weights arrived; several nats where they did not

The prompt is the same every time, and longer than the blocks in which samplers cache prompts: keys and values that belong to
earlier weights show, too.
"""

from __future__ import annotations

import torch
from torch import nn

from trl.data.layout import lay_out
from trl.errors import EngineError
from trl.models.patching import evaluating
from trl.models.score import score
from trl.rollouts.engine import Prompt, Rollout
from trl.rollouts.sampling import SamplingParams
from trl.types import Completion, Example

LENGTH, TOKENS = 160, 8
"""Tokens of the prompt, and sampled ones."""

PARAMS = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, seed=0)

TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.3}
"""Largest mean difference per token, in nats, by the coarser of both precisions."""


def probe(vocabulary: int, context: int | None) -> Prompt:
    """The prompt whose continuation is compared: tokens from all over the vocabulary."""
    length = LENGTH if context is None else max(1, min(LENGTH, context - TOKENS))
    return Prompt([(7919 * i + 13) % vocabulary for i in range(length)])


@torch.no_grad()
def check_weights(model: nn.Module, prompt: Prompt, rollout: Rollout, dtype: str | None, *, engine: str) -> float:
    """The mean difference per token. All processes take part. Raises EngineError where it is more than rounding explains."""
    own = next(model.parameters())
    batch = lay_out([Example(prompt.ids, (Completion(rollout.ids),))], "padded").to(own.device)
    with evaluating(model):
        logprobs = score(model, batch).logprobs[0]
    difference = (logprobs.cpu() - torch.tensor(rollout.logprobs)).abs().mean().item()
    precisions = {str(own.dtype).removeprefix("torch."), dtype or "bfloat16"}
    tolerance = max(TOLERANCE.get(each, 0.3) for each in precisions)
    if not difference <= tolerance:
        raise EngineError(
            f"{engine} does not sample from the weights of the trainer: its log-probabilities are off by {difference:.3g} nats "
            f"per token, and precision ({', '.join(sorted(precisions))}) explains {tolerance:g} at most. Is it started with the "
            "same model, does it see the folder of the weights (rollout_sync_dir), and is nobody else sending it weights?"
        )
    return difference
