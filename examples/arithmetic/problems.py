"""Arithmetic task: problems, a verifier, a character tokenizer, and a model small enough to train on a CPU.

    "7+5=" → "12"        "7*5=" → "35"

Problems are sums and products of two digits. The examples for fine-tuning are noisy: most of their answers are wrong. The
verifier computes which answers are right.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams

OPERATIONS = {"+": operator.add, "*": operator.mul}
PROBLEMS = {
    f"{a}{sign}{b}=": str(result(a, b)) for sign, result in OPERATIONS.items() for a in range(10) for b in range(10)
}
"""Question → answer."""
CHARACTERS = "0123456789+*="
LONGEST = 3
"""Maximum number of tokens of an answer, including EOS."""


def noisy_rows(count: int = 6000, *, right: float = 0.35, seed: int = 0) -> Dataset:
    """Questions with answers, of which the fraction `right` is right, and the others are off by one or two."""
    numbers = random.Random(seed)
    questions = numbers.choices(list(PROBLEMS), k=count)
    slips = [0 if numbers.random() < right else numbers.choice((-2, -1, 1, 2)) for _ in questions]
    answers = [str(abs(int(PROBLEMS[q]) + slip)) for q, slip in zip(questions, slips, strict=True)]
    return Dataset.from_dict({"prompt": questions, "completion": answers})


def question_rows() -> Dataset:
    """Every question, with the solution for the verifier."""
    return Dataset.from_dict({"prompt": list(PROBLEMS), "solution": list(PROBLEMS.values())})


def is_right(completions: Sequence[str], solution: Sequence[str]) -> list[float]:
    """The reward function: 1 for the right number and nothing else, 0 otherwise."""
    return [float(text == right) for text, right in zip(completions, solution, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def make_model() -> LlamaForCausalLM:
    """A Llama of 2 layers × 96."""
    sizes = {"vocab_size": 2 + len(CHARACTERS), "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, **special))


def accuracy(model: nn.Module, *, samples: int = 4, seed: int = 0) -> float:
    """Fraction of right answers among `samples` sampled answers to every question."""
    tokenizer, rows = make_tokenizer(), question_rows()
    engine = LocalEngine(model, tokenizer, progress=False)
    prompts = [Prompt(tokenizer(text)["input_ids"]) for text in rows["prompt"]]
    sampled = engine.generate(prompts, SamplingParams(max_new_tokens=LONGEST, seed=seed), n=samples)
    right = 0.0
    for rollouts, solution in zip(sampled, rows["solution"], strict=True):
        texts = [tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout in rollouts]
        right += sum(is_right(texts, [solution] * samples))
    return right / (samples * len(rows))
