"""Sample reviews: prompts cut from the beginnings of reviews, and a model's completions of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from trl.models.patching import evaluating
from trl.ops.rng import preserved_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prompt_openings(dataset: Iterable[Mapping[str, str]], *, words: int = 4) -> list[str]:
    """The first `words` words of each row's `text`. Openings of reviews are neutral: either sentiment may follow."""
    return [" ".join(row["text"].split()[:words]) for row in dataset]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[str]:
    """Sample one completion per prompt; return prompt and completion as plain text. The same seed gives the same
    samples.

    Samples at `temperature` without truncation, on the model's device. Restores the global random state and the model's
    training mode.
    """
    inputs = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(model.device)
    with preserved_rng(model.device), evaluating(model):
        torch.manual_seed(seed)
        tokens = model.generate(
            **inputs,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)
