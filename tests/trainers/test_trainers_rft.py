"""Which samples of a prompt rejection-sampling fine-tuning takes for the same."""

from __future__ import annotations

from trl.algorithms.rft import first_of_each
from trl.trainers.rft import prompts_and_texts
from trl.types import Completion, Example


def test_samples_that_read_alike_are_one(tokenizer):
    """Padding and an end in a completion are not seen by rewards: with them, a sample is no other one."""
    a, b, end, pad = *tokenizer.encode("ab"), tokenizer.eos_token_id, tokenizer.pad_token_id
    completions = ([a, b, end], [a, pad, b, end], [a, b], [b, a])
    example = Example([a], tuple(Completion(ids) for ids in completions))
    identity = prompts_and_texts([example, Example([b], (Completion([a, b]),))], tokenizer)
    assert identity == [(0, "ab"), (0, "ab"), (0, "ab"), (0, "ba"), (1, "ab")]
    assert first_of_each(identity, [True] * 5) == [True, False, False, True, True]
