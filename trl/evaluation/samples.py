"""Completions of prompts by a model, several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from trl.data.encode import encode_dataset
from trl.data.examples import ImageCollator
from trl.data.settings import EncodeSettings
from trl.models.patching import evaluating
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.vision.processing import ImageProcessing

Content = Any


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Content],
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> list[Content]:
    """A completion of each prompt: a text, or an assistant's message where the prompt is a conversation.

    `temperature` 0 takes the most likely token. The same seed gives the same completions.
    """
    options = {"do_sample": temperature > 0, "temperature": temperature or None, "top_k": 0, "top_p": 1.0}
    if not temperature:
        options = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    texts: list[str] = []
    with torch.random.fork_rng(), torch.no_grad(), evaluating(model):
        torch.manual_seed(seed)
        for batch in _batches(prompts, batch_size):
            inputs = _encoded(tokenizer, batch).to(model.device)
            tokens = model.generate(
                **inputs, **options, max_new_tokens=max_new_tokens, pad_token_id=_padding(tokenizer)
            )
            start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            texts += tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return [_like(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def sample_after_images(
    model: Any,
    images: ImageProcessing,
    rows: Dataset,
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> list[Content]:
    """The same for rows with a prompt and images, of a model with a processor."""
    tokenizer = images.processor.tokenizer
    encoded = encode_dataset(
        rows, tokenizer, settings=EncodeSettings(kind="prompt_only"), name="prompts", images=images
    )
    engine, collate = LocalEngine(model, tokenizer, progress=False), ImageCollator(images)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    texts: list[str] = []
    for number, batch in enumerate(_batches(range(len(rows)), batch_size)):
        prompts = list(map(Prompt.of, collate([encoded.dataset[i] for i in batch])))
        sampled = engine.generate(prompts, replace(params, seed=seed + number))
        texts += [tokenizer.decode(rollout.ids, skip_special_tokens=True) for (rollout,) in sampled]
    return [_like(prompt, text) for prompt, text in zip(rows["prompt"], texts, strict=True)]


def _batches(prompts: Sequence[Content], size: int) -> Iterator[Sequence[Content]]:
    for start in tqdm(range(0, len(prompts), size), desc="Sampling", unit=" batches"):
        yield prompts[start : start + size]


def _encoded(tokenizer: Any, prompts: Sequence[Content]) -> Any:
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    is_chat = not isinstance(prompts[0], str)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=not is_chat)
    encoded.pop("token_type_ids", None)
    return encoded


def _padding(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _like(prompt: Content, text: str) -> Content:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text.strip()}]
