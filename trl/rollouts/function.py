"""Rollouts from a function of the user, in the interface of TRL: it may run whole episodes with tools or environments.

    def rollout_func(prompts, trainer) -> dict:
        return {"prompt_ids": [...], "completion_ids": [...], "logprobs": [...], "env_mask": [...], "score": [...]}

`prompts` are the prompts of this process, each repeated once per completion; every list in the dict has one entry for each.
`env_mask` (1: the policy sampled the token) is optional. Further lists are passed to the reward functions under their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from trl.errors import DataError
from trl.rollouts.engine import Rollout

NEEDED = ("prompt_ids", "completion_ids", "logprobs")
KNOWN = (*NEEDED, "env_mask")


def rollouts_of(
    found: Any, count: int, n: int, ends: Sequence[int], version: int
) -> tuple[list[list[int]], list[list[Rollout]]]:
    """Token ids of `count` prompts, and n rollouts of each, from the result `found` of the function.

    A completion has the finish reason "stop" if its last token is in `ends`, else "length". Raises DataError that names the
    key and the entry of an invalid result.
    """
    _check_lists(found, count * n)
    further = [name for name in found if name not in KNOWN]
    rollouts, prompts = [], []
    for i in range(count * n):
        ids = list(found["completion_ids"][i])
        logprobs = [_number(value, i) for value in found["logprobs"][i]]
        mask = None if found.get("env_mask") is None else [int(value) for value in found["env_mask"][i]]
        for name, value in (("logprobs", logprobs), ("env_mask", mask)):
            if value is not None and len(value) != len(ids):
                raise DataError(
                    f"rollout_func: {name}[{i}] has {len(value)} entries for {len(ids)} tokens of completion_ids[{i}]."
                )
        if not ids:
            raise DataError(f"rollout_func: completion_ids[{i}] is empty: give at least one token.")
        reason = "stop" if ids[-1] in ends else "length"
        info = {name: found[name][i] for name in further}
        rollouts.append(Rollout(tuple(ids), tuple(logprobs), reason, mask and tuple(mask), version, info))
        prompts.append(list(found["prompt_ids"][i]))
    return _of_groups(prompts, n), [rollouts[p * n : (p + 1) * n] for p in range(count)]


def check_logprobs(rollouts: Sequence[Rollout]) -> None:
    """Raise DataError if every log-probability is 0: no policy is certain of every token, so they are placeholders."""
    if not any(value for rollout in rollouts for value in rollout.logprobs):
        raise DataError(
            "rollout_func: all logprobs are 0, as if the policy had been certain of every token, and ratios are computed from "
            "them: return those of the sampled tokens, or set recompute_old_logprobs=True."
        )


def _check_lists(found: Any, entries: int) -> None:
    if not isinstance(found, Mapping) or any(found.get(name) is None for name in NEEDED):
        given = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise DataError(f"rollout_func returned {given}: return a dict with {', '.join(NEEDED)}.")
    for name, values in found.items():
        if values is not None and len(values) != entries:
            raise DataError(
                f"rollout_func: {name} has {len(values)} entries for {entries} prompts: return one entry for each prompt passed."
            )


def _number(value: Any, index: int) -> float:
    """A log-probability from a number, or from a list whose first entry is the log-probability of the sampled token."""
    value = value[0] if isinstance(value, Sequence) and value else value
    if not isinstance(value, Real):
        raise DataError(f"rollout_func: logprobs[{index}] contains {value!r}, which is not a number.")
    return float(value)


def _of_groups(prompts: Sequence[list[int]], n: int) -> list[list[int]]:
    """The prompt of each group of n. Raises DataError if the n prompts of a group are not equal."""
    for i, prompt in enumerate(prompts):
        if prompt != prompts[i - i % n]:
            raise DataError(
                f"rollout_func: prompt_ids[{i}] and prompt_ids[{i - i % n}] belong to the same prompt, but differ: put the tokens "
                "that differ into completion_ids, with 0 in env_mask."
            )
    return list(prompts[::n])
