"""A made-up language, its tokenizer and model, and rows in it: everything a benchmark reads, out of a seed.

Words are syllables of a consonant and a vowel. The tokenizer is a byte-level BPE whose merges are written down rather
than learned: letters → syllables → words of two syllables → some words of three. It encodes any text; the words used
here are one token each, so a text of n tokens is written by choosing n words, and lengths are exact by construction.
"""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import accumulate, product
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SYLLABLES = [consonant + vowel for consonant, vowel in product("bcdfghjklmnpqrstvwxz", "aeiou")]
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 32_000
END_SHARE = 0.03
"""Part of the vocabulary that ends a text of the model that ends at random: a geometric length, 33 tokens on average."""

LONGEST = 1_024
"""Tokens of the longest row."""

TURN_OVERHEAD = 4
"""Tokens of a turn that are not its content: the role, a line break, the end mark, a line break."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


@cache
def three_syllable_words() -> tuple[tuple[str, str], ...]:
    """The (first two syllables, third) that fill the vocabulary up, drawn once and for all."""
    others = len((PAD, END, *ROLES)) + 256 + 2 * len(SYLLABLES) + 2 * len(SYLLABLES) ** 2
    drawn = random.Random(0).sample(range(len(SYLLABLES) ** 3), VOCABULARY - others)
    n = len(SYLLABLES)
    return tuple((SYLLABLES[i // n**2] + SYLLABLES[i // n % n], SYLLABLES[i % n]) for i in drawn)


def tokenizer():
    """A fast tokenizer of exactly 32,000 tokens with a chat template that marks what the assistant generates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "Ġ"
    merges = [(syllable[0], syllable[1]) for syllable in SYLLABLES]
    merges += [(space, syllable) for syllable in SYLLABLES]
    merges += [(space + first, second) for first, second in product(SYLLABLES, repeat=2)]
    merges += [(space + start, end) for start, end in three_syllable_words()]
    merges += list(product(SYLLABLES, repeat=2))
    tokens = [PAD, END, *ROLES, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}

    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, END, *ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2 * LONGEST,
    )


def model(*, seed: int, reward: bool = False, hidden: int = 256, layers: int = 6):
    """A Llama of about 15 M parameters (256 hidden, 6 layers, tied 32k embeddings), random weights in float32.

    With `reward`, the same trunk under a head of one label.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * LONGEST,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        num_labels=1 if reward else 2,
    )
    return (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config)


def ending_at_random(model):
    """The model, with `END_SHARE` of the vocabulary for end tokens: fresh weights choose nearly uniformly among tokens,
    so that every one sampled is the last with about that chance, whoever samples.
    """
    model.generation_config.eos_token_id = list(range(1, 1 + round(END_SHARE * VOCABULARY)))
    return model


def write_material(directory: Path, *, seed: int) -> None:
    """Save what every worker loads: `policy/`, `reward/` and `sampler/`, each with the tokenizer beside the weights."""
    words = tokenizer()
    made = {
        "policy": model(seed=seed),
        "reward": model(seed=seed, reward=True),
        "sampler": ending_at_random(model(seed=seed)),
    }
    for name, network in made.items():
        network.save_pretrained(directory / name)
        words.save_pretrained(directory / name)


@cache
def lexicon() -> tuple[list[str], list[float]]:
    """Words, and the cumulative weights of Zipf's law over them."""
    words = [first + second for first, second in product(SYLLABLES, repeat=2)]
    words += [start + end for start, end in three_syllable_words()]
    random.Random(0).shuffle(words)
    return words, list(accumulate(1 / (rank + 10) for rank in range(len(words))))


def prose(rng: random.Random, tokens: int, *, continues: bool = False) -> str:
    """Text of exactly `tokens` ≥ 1 tokens; one that `continues` another begins with a space."""
    words, weights = lexicon()
    drawn = rng.choices(words, cum_weights=weights, k=tokens)
    if not continues:
        drawn[0] = rng.choice(SYLLABLES) + rng.choice(SYLLABLES)  # without a space, three syllables are two tokens
    text = "".join("." if i % 12 == 11 else " " + word for i, word in enumerate(drawn))
    return text if continues else text[1:]


def chat_rows(count: int, *, seed: int, mean: float = 180, spread: float = 0.7) -> list[Row]:
    """Conversations of one to three exchanges; tokens, template included, are log-normal with `mean`, 32 to 1,024."""
    rng = random.Random(seed)
    location = math.log(mean) - spread**2 / 2
    return [_chat(rng, min(max(round(rng.lognormvariate(location, spread)), 32), LONGEST)) for _ in range(count)]


def _chat(rng: random.Random, tokens: int) -> Row:
    exchanges = rng.randint(1, min(3, tokens // 32))
    content = tokens - 2 * TURN_OVERHEAD * exchanges
    messages = []
    for k in range(exchanges):
        share = content * (k + 1) // exchanges - content * k // exchanges
        asked = max(1, round(share * rng.uniform(0.15, 0.45)))
        messages.append({"role": "user", "content": prose(rng, asked)})
        messages.append({"role": "assistant", "content": prose(rng, share - asked)})
    return {"messages": messages}


def prompt_rows(count: int, *, seed: int, prompt: tuple[int, int]) -> list[Row]:
    """Prompts alone; `prompt` bounds their tokens, uniformly drawn."""
    rng = random.Random(seed)
    return [{"prompt": prose(rng, rng.randint(*prompt))} for _ in range(count)]


def completion_rows(
    count: int, *, seed: int, prompt: tuple[int, int] = (400, 800), completion: tuple[int, int] = (40, 80)
) -> list[Row]:
    """Prompt-completion rows; `prompt` and `completion` bound the tokens of each, uniformly drawn."""
    rng = random.Random(seed)
    return [
        {"prompt": prose(rng, rng.randint(*prompt)), "completion": prose(rng, rng.randint(*completion), continues=True)}
        for _ in range(count)
    ]


def preference_rows(
    count: int, *, seed: int, prompt: tuple[int, int] = (350, 450), completion: tuple[int, int] = (60, 100)
) -> list[Row]:
    """One prompt with a chosen and a rejected completion of independent lengths."""
    rng = random.Random(seed)
    return [
        {
            "prompt": prose(rng, rng.randint(*prompt)),
            "chosen": prose(rng, rng.randint(*completion), continues=True),
            "rejected": prose(rng, rng.randint(*completion), continues=True),
        }
        for _ in range(count)
    ]


def unpaired_rows(
    count: int, *, seed: int, prompt: tuple[int, int] = (40, 80), completion: tuple[int, int] = (60, 100)
) -> list[Row]:
    """Prompt-completion rows with a label; good and bad take turns, so that every batch holds both."""
    rows = completion_rows(count, seed=seed, prompt=prompt, completion=completion)
    return [row | {"label": i % 2 == 0} for i, row in enumerate(rows)]
