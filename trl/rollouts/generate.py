"""Sampling by `model.generate`, for models and options that the engine's own loop does not support.

Prompts are sampled one at a time, each seeded by (seed, index of the prompt), so that samples do not depend on the other
prompts. Log-probabilities come from a forward pass over prompt and completion. The random numbers are torch's, so that
samples differ from those of the engine's loop at the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.models.rotary import length_dependent
from trl.models.score import score, unwrap
from trl.ops.rng import preserved_rng
from trl.rollouts.decoders import Policy, decoder_start
from trl.rollouts.engine import FinishReason, Prompt, Rollout
from trl.rollouts.sampler import full_config
from trl.rollouts.sampling import SamplingParams, stream
from trl.rollouts.stopping import Stopper
from trl.types import Completion, Example
from trl.vision.families import joins_of


def generate_rollouts(
    policy: Policy,
    prompts: Sequence[Prompt],
    limits: Sequence[int],
    params: SamplingParams,
    n: int,
    stopper: Stopper,
    bar: tqdm,
) -> list[list[Rollout]]:
    """n rollouts of each prompt, of at most `limits[p]` tokens."""
    rollouts = []
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        with preserved_rng(policy.device):
            torch.manual_seed(int(stream(params.seed, torch.tensor([index]), torch.tensor([0]))))
            samples = _generate(policy, prompt, limit, params, n, stopper)
        rollouts.append([_rollout(policy, prompt, ids, limit, params, stopper) for ids in samples])
        bar.update(n)
    return rollouts


def _generate(
    policy: Policy, prompt: Prompt, limit: int, params: SamplingParams, n: int, stopper: Stopper
) -> list[list[int]]:
    """Token ids of n completions, with the padding that `generate` appends to the shorter ones."""
    ids = torch.tensor([list(prompt.ids)], device=policy.device)
    before = 1 if policy.inner.config.is_encoder_decoder else ids.shape[1]
    config = full_config(params, sorted(stopper.tokens), before, limit)
    config.max_length = None
    copies = n if params.greedy and (config.num_beams or 1) == 1 else 1
    config.num_return_sequences = n // copies
    config.stop_strings = list(params.stop) or None
    if length_dependent(policy.inner.config):
        config.use_cache = False  # the rotary frequencies, and so all cached keys, change when the sequence grows long
    out = policy.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        tokenizer=stopper.tokenizer,
        **policy.prompt_inputs([prompt], [len(prompt)]),
    )
    return out[:, before:].tolist() * copies


def _rollout(
    policy: Policy, prompt: Prompt, ids: list[int], limit: int, params: SamplingParams, stopper: Stopper
) -> Rollout:
    """The completion up to its end, which `stopper` finds, with its log-probabilities."""
    length, reason = _end(ids, limit, stopper)
    ids = ids[:length]
    logprobs = logprobs_of(policy.model, prompt, ids, params.temperature or 1.0)
    return Rollout(tuple(ids), tuple(logprobs.tolist()), reason)


def _end(ids: list[int], limit: int, stopper: Stopper) -> tuple[int, FinishReason]:
    for length in range(1, len(ids) + 1):
        if reason := stopper.reason(ids[:length], limit):
            return length, reason
    return len(ids), "length"


def logprobs_of(model: nn.Module, prompt: Prompt, ids: Sequence[int], temperature: float) -> Tensor:
    """Log-probabilities [C] of a completion's tokens under the unmodified policy, at `temperature`."""
    inner = unwrap(model)
    example = Example(prompt.ids, (Completion(ids),), prompt.inputs, prompt.positions, prompt.next_position)
    if inner.config.is_encoder_decoder:
        batch = lay_out_encoder_decoder([example], pad_token_id=0, decoder_start_token_id=decoder_start(inner))
    else:
        batch = lay_out([example], joins=joins_of(inner.config))
    return score(model, batch.to(next(model.parameters()).device), temperature=temperature).logprobs[0]
