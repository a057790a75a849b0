"""When the log-probabilities of a server are those of the policy: log-softmax(logits / τ) before truncation, penalty and ban.

    mode                  what the server returns                                      equal to the policy's if
    policy_logprobs       log-softmax(logits/τ)                                        always
    raw_logprobs          log-softmax(logits)                                          τ is 1, or 0 (reported at τ = 1)
    processed_logprobs    log-softmax after τ, penalties and bans, over the tokens     nothing is truncated, penalised or banned
                          that top-k, top-p and min-p keep
    raw_logits, …         unnormalised logits                                          never

`policy_logprobs` is the mode of `trl serve`; the others are values of `vllm serve --logprobs-mode`.
"""

from __future__ import annotations

from collections.abc import Callable

from trl.rollouts.sampling import SamplingParams


def is_unmodified(params: SamplingParams) -> bool:
    """True if `params` samples from the model's whole distribution, changed by the temperature alone."""
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
    """True if a server in this mode returns the policy's log-probabilities for samples with these parameters."""
    return MODES.get(mode, MODES["raw_logits"])(params)
