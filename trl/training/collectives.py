"""Collective operations: advantages over the rollouts of all processes, and gathering of tensors and objects.

    experience of this process ──gather──▶ of all ──algorithm.advantages──▶ signals ──▶ this process's part

So statistics of a rollout batch (normalised advantages, a quantile of entropies) do not depend on the number of processes that
sampled it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed

from trl.types import Experience


def advantages_over_ranks(
    local: Experience, advantages: Callable[[Experience], Experience], accelerator: Accelerator
) -> tuple[Experience, Experience]:
    """Call `advantages` on the experience of all processes; return this process's part of the result, and the whole."""
    if accelerator.num_processes == 1:
        found = advantages(local)
        return found, found
    whole, start = gather_experience(local, accelerator)
    whole = advantages(whole)
    rows, width = slice(start, start + len(local.rewards)), local.mask.shape[1]
    own = {name: v[rows] if v.dim() == 1 else v[rows, :width] for name, v in whole.signals.items()}
    return local.with_signals(**own), whole


def gather_experience(local: Experience, accelerator: Accelerator) -> tuple[Experience, int]:
    """The experience of all processes in rank order, and the index of this process's first row."""
    group = local.group * accelerator.num_processes + accelerator.process_index
    vectors = {"rewards": local.rewards, "group": group}
    vectors |= {name: v for name, v in sorted(local.signals.items()) if v.dim() == 1}
    tables = {"mask": local.mask} | {name: v for name, v in sorted(local.signals.items()) if v.dim() == 2}
    numbers, start = gather_rows(torch.stack([v.double() for v in vectors.values()], 1), accelerator)
    grids, _ = gather_rows(torch.stack([v.float() for v in tables.values()], 1), accelerator)
    found = dict(zip([*vectors, *tables], [*numbers.unbind(1), *grids.unbind(1)], strict=True))
    signals = {name: found[name].to(value.dtype) for name, value in local.signals.items()}
    return Experience(found["rewards"].to(local.rewards.dtype), found["group"].long(), found["mask"], signals), start


def gather_rows(rows: Tensor, accelerator: Accelerator) -> tuple[Tensor, int]:
    """`rows [N,…]` of all processes in rank order, and the index of this process's first row.

    Processes may have different numbers of rows; other dimensions are padded with zeros to the largest size.
    """
    if accelerator.num_processes == 1:
        return rows, 0
    shapes = accelerator.gather(torch.tensor([rows.shape], device=accelerator.device)).cpu()
    most = shapes.amax(0).tolist()
    missing = [side for n, m in zip(reversed(rows.shape), reversed(most), strict=True) for side in (0, m - n)]
    parts = accelerator.gather(F.pad(rows, missing).to(accelerator.device)).cpu().split(most[0])
    counts = shapes[:, 0].tolist()
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return whole, sum(counts[: accelerator.process_index])


def all_gather_object(value: Any, accelerator: Accelerator) -> list[Any]:
    """The values of all processes, on every process. A value is anything that can be pickled."""
    return [value] if accelerator.num_processes == 1 else gather_object([value])


def is_main() -> bool:
    """Whether this is the main process (rank 0, or the only one)."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def run_on_main(function: Callable[[], Any]) -> Any:
    """Call `function` on the main process only, and return its result (or raise its error) on every process."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except Exception as error:  # raised again below, as on the others
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_on_main(value: Any) -> list[Any]:
    """The values of all processes in rank order on the main process; an empty list on the others."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * distributed.get_world_size() if is_main() else []
    distributed.gather_object(value, found if is_main() else None)
    return found
