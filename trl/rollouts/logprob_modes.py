"""Which log-probabilities of a server are the policy's own: log-softmax(logits / τ), before truncation, penalty and ban.

    mode                  what the server tells                                        the policy's own where
    policy_logprobs       log-softmax(logits/τ)                                        always
    raw_logprobs          log-softmax(logits)                                          τ is 1, or 0 (greedy samples count at 1)
    processed_logprobs    log-softmax after τ, penalties, bans, and over what          nothing is truncated, penalised or banned
                          top-k, top-p and min-p keep
    raw_logits, …         numbers that are not normalised                              never

The modes but for the first, that of `trl serve`, are those of `vllm serve --logprobs-mode`.
"""

from __future__ import annotations

from collections.abc import Callable

from trl.rollouts.sampling import SamplingParams


def is_unmodified(params: SamplingParams) -> bool:
    """Whether samples come from the whole distribution, as the model gives it at this temperature."""
    kept = params.top_k == 0 and params.top_p == 1 and params.min_p == 0
    return kept and params.repetition_penalty == 1 and params.min_new_tokens == 0 and not params.banned_tokens


MODES: dict[str, Callable[[SamplingParams], bool]] = {
    "policy_logprobs": lambda params: True,
    "raw_logprobs": lambda params: params.temperature in (0, 1),
    "processed_logprobs": is_unmodified,
    "raw_logits": lambda params: False,
    "processed_logits": lambda params: False,
}


def tells_policy(mode: str, params: SamplingParams) -> bool:
    """Whether a server in this mode tells the policy's own log-probabilities of samples with these parameters."""
    return MODES.get(mode, MODES["raw_logits"])(params)
