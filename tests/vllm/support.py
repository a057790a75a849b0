"""What the tests against vLLM share: a model that its kernels take, prompts, and how far samples are from the trainer's
scores."""

from __future__ import annotations

import torch

from trl.data.layout import lay_out
from trl.models.score import score
from trl.rollouts.engine import Prompt
from trl.rollouts.sampling import SamplingParams
from trl.types import Completion, Example

PROMPTS = [Prompt([7 + i, *range(8, 8 + 3 * i)]) for i in range(4)] + [Prompt([i % 90 + 6 for i in range(200)])]
PARAMS = SamplingParams(max_new_tokens=12, seed=3)

OPTIONS = [{}, {"temperature": 0.7}, {"top_k": 10}, {"top_p": 0.9}, {"repetition_penalty": 1.3}, {"min_new_tokens": 8}]
"""Rows of the table of log-probability modes."""


def llama(seed):
    """A model with heads wide enough for vLLM's kernels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def largest_difference(model, groups, temperature=1.0):
    """Between the log-probabilities that came with rollouts of PROMPTS and those of the model, over all tokens."""
    examples = [
        Example(prompt.ids, tuple(Completion(r.ids) for r in group))
        for prompt, group in zip(PROMPTS, groups, strict=True)
    ]
    with torch.no_grad():
        logprobs = score(model, lay_out(examples, "padded"), temperature=temperature).logprobs
    rollouts = [rollout for group in groups for rollout in group]
    return max(
        abs(a - b)
        for row, r in zip(logprobs, rollouts, strict=True)
        for a, b in zip(row[: len(r)].tolist(), r.logprobs, strict=True)
    )
