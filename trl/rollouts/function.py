"""Rollouts by a function of the user's, as TRL has it: whole episodes with tools or environments, in whatever way they are made.

    def rollout_func(prompts, trainer) -> dict:
        return {"prompt_ids": [...], "completion_ids": [...], "logprobs": [...], "env_mask": [...], "score": [...]}

`prompts` are those of this process, each as often as it has completions; every list has one entry for each of them. `env_mask`
(1: the policy wrote the token) may be left out. Further lists go to the reward functions under their names.
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
    """Token ids of `count` prompts, and n rollouts of each, from what the function gave.

    A completion that ends with one of the tokens `ends` has come to its end. Raises DataError, naming the key and the entry.
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


def _check_lists(found: Any, entries: int) -> None:
    if not isinstance(found, Mapping) or any(found.get(name) is None for name in NEEDED):
        given = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise DataError(f"rollout_func gives a dict with {', '.join(NEEDED)}; it gave {given}.")
    for name, values in found.items():
        if values is not None and len(values) != entries:
            raise DataError(
                f"rollout_func: {name} has {len(values)} entries for {entries} prompts: give one for each that it was given."
            )


def _number(value: Any, index: int) -> float:
    """A log-probability: a number, or a list that begins with that of the sampled token."""
    value = value[0] if isinstance(value, Sequence) and value else value
    if not isinstance(value, Real):
        raise DataError(f"rollout_func: logprobs[{index}] holds {value!r}, which is no number.")
    return float(value)


def _of_groups(prompts: Sequence[list[int]], n: int) -> list[list[int]]:
    """The prompt of each group. Raises DataError where completions of one prompt do not begin with the same tokens."""
    for i, prompt in enumerate(prompts):
        if prompt != prompts[i - i % n]:
            raise DataError(
                f"rollout_func: prompt_ids[{i}] are not those of prompt_ids[{i - i % n}], and both are of one prompt: what differs "
                "belongs into completion_ids, with 0 in env_mask."
            )
    return list(prompts[::n])
