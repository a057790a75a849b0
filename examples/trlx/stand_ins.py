"""Models and data of the example scripts: small local ones, or with TRLX_EXAMPLES=hub those from the hub.

| | local | hub |
|---|---|---|
| model of reviews | a GPT-2 of 0.2 million parameters, trained here on 400 reviews | lvwerra/gpt2-imdb |
| encoder-decoder | a T5 of two layers, not trained | google/flan-t5-small |
| reviews | those that come with `trl` | stanfordnlp/imdb |
| sentiment | naive Bayes of their words | lvwerra/distilbert-imdb |
| dialogues, posts | a handful, below | Dahoas/full-hh-rlhf, CarperAI/openai_summarize_tldr |
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from trl.demo.model import make_model, train_tokenizer
from trl.demo.reviews import load_reviews

HUB = os.environ.get("TRLX_EXAMPLES") == "hub"
FOLDER = Path(os.environ.get("TRLX_EXAMPLES_FOLDER", "ckpts/stand-ins"))
STEPS = 60
"""Optimizer steps of training the local model on the reviews."""


@cache
def reviews() -> tuple[list[str], list[str]]:
    """Texts, and "positive" or "negative" for each."""
    if HUB:
        from datasets import load_dataset

        rows = load_dataset("stanfordnlp/imdb", split="train+test").shuffle(seed=0)
        return rows["text"], [("negative", "positive")[label] for label in rows["label"]]
    rows = load_reviews("train").select(range(400))
    return list(rows["text"]), list(rows["label"])


@cache
def review_model() -> str:
    """Name of a model that writes reviews, with its tokenizer."""
    if HUB:
        return "lvwerra/gpt2-imdb"
    folder = FOLDER / "reviews"
    if (folder / "config.json").is_file():
        return str(folder)
    texts, _ = reviews()
    tokenizer = train_tokenizer(texts, vocab_size=768)
    tokenizer.bos_token = tokenizer.eos_token
    torch.manual_seed(0)
    model = make_model(tokenizer, width=64)
    ids = tokenizer(texts, padding=True, return_tensors="pt")
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(STEPS):
        rows = slice(16 * step % 400, 16 * step % 400 + 16)
        model(ids["input_ids"][rows], attention_mask=ids["attention_mask"][rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@cache
def encoder_decoder() -> str:
    """Name of an encoder-decoder, with its tokenizer."""
    if HUB:
        return "google/flan-t5-small"
    folder = FOLDER / "t5"
    if not (folder / "config.json").is_file():
        tokenizer = train_tokenizer(reviews()[0], vocab_size=768)
        sizes = {"vocab_size": len(tokenizer), "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**sizes, **special, decoder_start_token_id=special["pad_token_id"]))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


@cache
def sentiment() -> Callable[[Sequence[str]], list[float]]:
    """A function that gives the probability of "positive" for each text."""
    if HUB:
        from trl import ClassifierReward

        classify = ClassifierReward("lvwerra/distilbert-imdb")
        return lambda texts: list(classify(prompts=[""] * len(texts), completions=list(texts)))
    return _naive_bayes(*reviews())


def _naive_bayes(texts: Sequence[str], labels: Sequence[str]) -> Callable[[Sequence[str]], list[float]]:
    pairs = list(zip(texts, labels, strict=True))
    counts = {
        label: Counter(word for text, other in pairs if other == label for word in text.split())
        for label in set(labels)
    }
    words = set().union(*counts.values())

    def log_odds(word: str) -> float:
        good, bad = (
            (counts[label][word] + 1) / (counts[label].total() + len(words)) for label in ("positive", "negative")
        )
        return math.log(good / bad)

    weights = {word: log_odds(word) for word in words}
    return lambda given: [1 / (1 + math.exp(-sum(weights.get(word, 0.0) for word in text.split()))) for text in given]


DIALOGUES = [
    ("\n\nHuman: How do I boil an egg?\n\nAssistant:", " Put it into boiling water for eight minutes.", " No idea."),
    (
        "\n\nHuman: What is a haiku?\n\nAssistant:",
        " A poem of three lines, with five, seven and five syllables.",
        " A fish.",
    ),
    (
        "\n\nHuman: I feel sad today.\n\nAssistant:",
        " I am sorry to hear that. Would you like to talk about it?",
        " So what.",
    ),
    ("\n\nHuman: Where is Lima?\n\nAssistant:", " It is the capital of Peru, on the coast.", " Far away."),
] * 4
"""A question, the answer that people chose, and the one that they rejected."""


def dialogues() -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected answer."""
    if not HUB:
        return DIALOGUES
    from datasets import load_dataset

    rows = load_dataset("Dahoas/full-hh-rlhf", split="train")
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def posts() -> list[tuple[str, str]]:
    """A post, and its summary."""
    if not HUB:
        texts, _ = reviews()
        return [(f"{text} TL;DR:", f" {text.split('.')[0]}.") for text in texts[:32]]
    from datasets import load_dataset

    return [(row["prompt"], row["label"]) for row in load_dataset("CarperAI/openai_summarize_tldr", split="train")]


def overlap(summaries: Sequence[str], references: Sequence[str]) -> list[float]:
    """F₁ of the words that a summary shares with another one (ROUGE-1)."""
    scores = []
    for one, other in zip(summaries, references, strict=True):
        a, b = Counter(one.split()), Counter(other.split())
        both = (a & b).total()
        scores.append(2 * both / (a.total() + b.total()) if both else 0.0)
    return scores
