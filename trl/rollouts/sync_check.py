"""Whether a sampler has the trainer's weights: both score the same few tokens.

    |log π_sampler(y) − log π_trainer(y)| per token      rounding where the weights arrived; several nats where they did not

The prompt is the same every time, and longer than the blocks in which samplers cache prompts: keys and values that belong to
earlier weights show, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn

from trl.errors import EngineError
from trl.models.patching import evaluating
from trl.models.score import unwrap
from trl.models.sharding import is_whole
from trl.rollouts.engine import Prompt, Rollout
from trl.rollouts.generate import logprobs_of
from trl.rollouts.sampling import SamplingParams
from trl.vision.families import image_token_ids

LENGTH, TOKENS = 160, 8
"""Tokens of the prompt, and sampled ones."""

PARAMS = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, seed=0)

TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.3}
"""Largest mean difference per token, in nats, by the coarser of both precisions."""


IMAGE_TOLERANCE = 0.05
"""The least that is allowed for a sample after an image, whose pixels the sampler may round in other ways."""


def probe(vocabulary: int, context: int | None, images: Collection[int] = ()) -> Prompt:
    """The prompt whose continuation is compared: tokens from all over the vocabulary, but for those that stand for `images`."""
    length = LENGTH if context is None else max(1, min(LENGTH, context - TOKENS))
    words = [token for token in range(vocabulary) if token not in images]
    return Prompt([words[(7919 * i + 13) % len(words)] for i in range(length)])


def check_weights(model: nn.Module, prompt: Prompt, rollout: Rollout, dtype: str | None, *, engine: str) -> float:
    """The mean difference per token. All processes take part. Raises EngineError where it is more than rounding explains."""
    difference, precisions = _difference(model, prompt, rollout, 1.0), _precisions(model, [dtype])
    tolerance = max(TOLERANCE.get(each, 0.3) for each in precisions)
    if not difference <= tolerance:
        raise EngineError(
            f"{engine} does not sample from the weights of the trainer: its log-probabilities are off by {difference:.3g} nats "
            f"per token, and precision ({', '.join(sorted(precisions))}) explains {tolerance:g} at most. Is it started with the "
            "same model, does it see the folder of the weights (rollout_sync_dir), and is nobody else sending it weights?"
        )
    return difference


def check_images(
    model: nn.Module,
    prompts: Sequence[Prompt],
    sampled: Sequence[Sequence[Rollout]],
    params: SamplingParams,
    dtypes: Iterable[str | None],
    *,
    engine: str,
) -> float | None:
    """The mean difference per token of the first sample after images; None where there is none, or the model is in shards.

    Raises EngineError where the sampler saw other pixels.
    """
    pairs = zip(prompts, sampled, strict=True)
    first = next(((prompt, each[0]) for prompt, each in pairs if prompt.unexpanded is not None), None)
    if first is None or not is_whole(model):
        return None
    difference, precisions = _difference(model, *first, params.temperature or 1.0), _precisions(model, dtypes)
    tolerance = max(IMAGE_TOLERANCE, *(TOLERANCE.get(each, 0.3) for each in precisions))
    if not difference <= tolerance:
        raise EngineError(
            f"{engine} does not see images as the trainer does: log-probabilities of a sample after one are off by "
            f"{difference:.3g} nats per token, and {tolerance:g} are allowed. Serve the model from a folder with the "
            "trainer's own processor (processor.save_pretrained), and give it no --mm-processor-kwargs."
        )
    return difference


@torch.no_grad()
def _difference(model: nn.Module, prompt: Prompt, rollout: Rollout, temperature: float) -> float:
    """Mean difference per token of the rollout, as far as it is text: samplers may draw what stands for an image."""
    images = image_token_ids(unwrap(model).config)
    end = next((t for t, token in enumerate(rollout.ids) if token in images), len(rollout))
    if not end:
        return 0.0
    with evaluating(model):
        logprobs = logprobs_of(model, prompt, rollout.ids[:end], temperature)
    return (logprobs.cpu() - torch.tensor(rollout.logprobs[:end])).abs().mean().item()


def _precisions(model: nn.Module, dtypes: Iterable[str | None]) -> set[str]:
    """The trainer's and the sampler's; of one that says nothing the coarsest is assumed."""
    return {str(next(model.parameters()).dtype).removeprefix("torch."), *(each or "bfloat16" for each in dtypes)}
