"""Sample completions of a dataset's prompts in batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from trl.data.encode import decode, encode_dataset
from trl.data.examples import ImageCollator
from trl.data.settings import EncodeSettings
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.vision.processing import ImageProcessing

Content = Any


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    images: ImageProcessing | None = None,
) -> list[Content]:
    """Sample one completion per row's `prompt`: a text, or an assistant message if the prompt is a conversation.

    `temperature` 0 is greedy decoding. The same seed gives the same completions. With `images`, the model also reads
    the rows' images.
    """
    settings = EncodeSettings(kind="prompt_only", encoder_decoder=model.config.is_encoder_decoder)
    read = rows.select_columns(["prompt"]) if images is None else rows
    encoded = encode_dataset(read, tokenizer, settings=settings, name="prompts", images=images)
    engine = LocalEngine(model, tokenizer, progress=False)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    texts: list[str] = []
    starts = tqdm(range(0, len(rows), batch_size), desc="Sampling", unit=" batches")
    for number, start in enumerate(starts):
        batch = [encoded.dataset[i] for i in range(start, min(start + batch_size, len(rows)))]
        examples = chain.from_iterable(map(decode, batch)) if images is None else ImageCollator(images)(batch)
        sampled = engine.generate(list(map(Prompt.of, examples)), replace(params, seed=seed + number))
        texts += [tokenizer.decode(rollout.ids, skip_special_tokens=True) for (rollout,) in sampled]
    return [_like(prompt, text) for prompt, text in zip(rows["prompt"], texts, strict=True)]


def _like(prompt: Content, text: str) -> Content:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text.strip()}]
