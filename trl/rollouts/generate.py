"""Sampling by `model.generate`, for what the engine's own loop does not do.

One prompt at a time, seeded by (seed, prompt), so that nothing depends on what else is sampled; log-probabilities come
from a forward over prompt and completion. Random numbers are torch's, so samples differ from the loop's at the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from trl.data.layout import lay_out
from trl.models.rotary import length_dependent
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
        with torch.random.fork_rng():
            torch.manual_seed(int(stream(params.seed, torch.tensor([index]), torch.tensor([0]))))
            samples = _generate(policy, prompt, limit, params, n, stopper)
        rollouts.append([_rollout(policy, prompt, ids, limit, params, stopper) for ids in samples])
        bar.update(n)
    return rollouts


def _generate(
    policy: Policy, prompt: Prompt, limit: int, params: SamplingParams, n: int, stopper: Stopper
) -> list[list[int]]:
    """Token ids of n completions, with whatever `generate` appends to the shorter ones."""
    ids = torch.tensor([list(prompt.ids)], device=policy.device)
    before = 1 if policy.inner.config.is_encoder_decoder else ids.shape[1]
    config = full_config(params, sorted(stopper.tokens), before, limit)
    config.max_length = None
    copies = n if params.greedy and (config.num_beams or 1) == 1 else 1
    config.num_return_sequences = n // copies
    config.stop_strings = list(params.stop) or None
    if length_dependent(policy.inner.config):
        config.use_cache = False  # keys of a sequence that grows long are other ones from there on
    out = policy.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        tokenizer=stopper.tokenizer,
        **policy.beside([prompt], [len(prompt)]),
    )
    return out[:, before:].tolist() * copies


def _rollout(
    policy: Policy, prompt: Prompt, ids: list[int], limit: int, params: SamplingParams, stopper: Stopper
) -> Rollout:
    """The completion up to its end, by the same rules as everywhere, with its log-probabilities."""
    length, reason = _end(ids, limit, stopper)
    ids = ids[:length]
    return Rollout(tuple(ids), tuple(_logprobs(policy, prompt, ids, params).tolist()), reason)


def _whole(policy: Policy, prompt: Prompt, more: int) -> dict[str, Tensor]:
    """What a forward over the prompt and `more` tokens reads beside them."""
    example = Example(prompt.ids, (Completion([0] * more),), prompt.inputs, prompt.positions, prompt.next_position)
    inputs = lay_out([example], joins=joins_of(policy.inner.config)).inputs
    names = [*prompt.inputs, *(["position_ids"] if prompt.positions is not None else [])]
    return {name: inputs[name].to(policy.device) for name in names}


def _end(ids: list[int], limit: int, stopper: Stopper) -> tuple[int, FinishReason]:
    for length in range(1, len(ids) + 1):
        if reason := stopper.reason(ids[:length], limit):
            return length, reason
    return len(ids), "length"


def _logprobs(policy: Policy, prompt: Prompt, ids: list[int], params: SamplingParams) -> Tensor:
    """log π [C] of the completion's tokens under the unmodified policy."""
    if policy.inner.config.is_encoder_decoder:
        given, start = list(prompt.ids), [decoder_start(policy.inner)]
        inputs = {"decoder_input_ids": torch.tensor([start + ids[:-1]], device=policy.device)}
    else:
        given, inputs = [*prompt.ids, *ids[:-1]], _whole(policy, prompt, len(ids) - 1)
    given = torch.tensor([given], device=policy.device)
    logits = policy.model(input_ids=given, use_cache=False, return_dict=True, **inputs).logits
    scaled = logits[0, -len(ids) :].float() / (params.temperature or 1)
    return scaled.log_softmax(-1).gather(1, torch.tensor(ids, device=policy.device)[:, None]).squeeze(1)
