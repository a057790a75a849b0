"""Check that a sampler has the trainer's weights, by comparing log-probabilities of the same few tokens.

    |log π_sampler(y) − log π_trainer(y)| per token      small if the weights arrived, else several nats

The prompt is the same every time, and longer than the blocks in which samplers cache prompts, so that the check also finds
cached keys and values of earlier weights.
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
"""Number of tokens in the prompt, and of sampled tokens."""

PARAMS = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, seed=0)

TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.3}
"""Largest mean difference per token that is allowed, in nats, by the lower of the two precisions."""


IMAGE_TOLERANCE = 0.05
"""Lower bound of the tolerance for samples after images, since the sampler may process pixels with other rounding."""


def probe(vocabulary: int, context: int | None, images: Collection[int] = ()) -> Prompt:
    """The prompt of the check: tokens from all over the vocabulary, except the image tokens `images`."""
    length = LENGTH if context is None else max(1, min(LENGTH, context - TOKENS))
    words = [token for token in range(vocabulary) if token not in images]
    return Prompt([words[(7919 * i + 13) % len(words)] for i in range(length)])


def check_weights(model: nn.Module, prompt: Prompt, rollout: Rollout, dtype: str | None, *, engine: str) -> float:
    """The mean difference per token, in nats; a collective call. Raises EngineError if it exceeds the tolerance."""
    difference, precisions = _difference(model, prompt, rollout, 1.0), _precisions(model, [dtype])
    tolerance = max(TOLERANCE.get(each, 0.3) for each in precisions)
    if not difference <= tolerance:
        raise EngineError(
            f"{engine} does not sample from the weights of the trainer: its log-probabilities are off by {difference:.3g} nats "
            f"per token, but rounding ({', '.join(sorted(precisions))}) explains at most {tolerance:g}. Check that it was started "
            "with the same model, that it sees the folder of the weights (rollout_sync_dir), and that no other trainer sends it "
            "weights."
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
    """The mean difference per token of the first sample after an image; None if no prompt has images or the model is sharded.

    Raises EngineError if it exceeds the tolerance: the sampler then processes images differently.
    """
    pairs = zip(prompts, sampled, strict=True)
    first = next(((prompt, each[0]) for prompt, each in pairs if prompt.unexpanded is not None), None)
    if first is None or not is_whole(model):
        return None
    difference, precisions = _difference(model, *first, params.temperature or 1.0), _precisions(model, dtypes)
    tolerance = max(IMAGE_TOLERANCE, *(TOLERANCE.get(each, 0.3) for each in precisions))
    if not difference <= tolerance:
        raise EngineError(
            f"{engine} does not process images as the trainer does: log-probabilities of a sample after an image are off by "
            f"{difference:.3g} nats per token, and at most {tolerance:g} are allowed. Serve the model from a folder with the "
            "trainer's own processor (processor.save_pretrained), and without --mm-processor-kwargs."
        )
    return difference


@torch.no_grad()
def _difference(model: nn.Module, prompt: Prompt, rollout: Rollout, temperature: float) -> float:
    """Mean difference per token over the rollout's tokens before the first image token, which a sampler may have drawn."""
    images = image_token_ids(unwrap(model).config)
    end = next((t for t, token in enumerate(rollout.ids) if token in images), len(rollout))
    if not end:
        return 0.0
    with evaluating(model):
        logprobs = logprobs_of(model, prompt, rollout.ids[:end], temperature)
    return (logprobs.cpu() - torch.tensor(rollout.logprobs[:end])).abs().mean().item()


def _precisions(model: nn.Module, dtypes: Iterable[str | None]) -> set[str]:
    """The dtypes of the trainer's model and of the samplers; a sampler that does not tell its own is taken for bfloat16."""
    return {str(next(model.parameters()).dtype).removeprefix("torch."), *(each or "bfloat16" for each in dtypes)}
