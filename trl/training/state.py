"""A registry for the parts of a trainer whose state is saved in checkpoints and restored from them.

    self.states.register("rollouts", StateFunctions(self._buffer_state, self._load_buffer), per_rank=True)

A part is any object with `state_dict()` and `load_state_dict(state)`. A trainer registers it once, by name. In a checkpoint,
states that are the same on all processes are in `trl_state.pt`, those of the process with rank R in `trl_state_R.pt`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trl.errors import ConfigError
from trl.models.reference import AdapterOff, FrozenModel, Reference, SnapshotReference
from trl.models.score import unwrap
from trl.models.sharding import shards

logger = logging.getLogger(__name__)

WORDS = {"cpu": 2**16}
"""Device → number of 64-bit words that are hashed at a time: what fits into a CPU's cache; `MANY_WORDS` on other devices."""
MANY_WORDS = 2**24
MIX = 0x2545F4914F6CDD1D
"""An odd constant with an irregular bit pattern."""


class Stateful(Protocol):
    """A part of a trainer whose state belongs in a checkpoint.

    States are dicts of tensors, numbers, strings, lists and dicts, so that they are loaded without running code from the file.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class StateFunctions:
    """A `Stateful` part that consists of two functions."""

    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Weights:
    """The parameters (or local shards) of a model that changes without being trained by the optimizer."""

    model: nn.Module

    def state_dict(self) -> dict[str, Any]:
        return shards(self.model)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, shard in shards(self.model).items():
            shard.copy_(state[name])


@dataclass(frozen=True)
class Unchanged:
    """Weights that do not change: a checkpoint holds only their fingerprint, which a resumed run has to match.

    `what` names them in the error if it does not.
    """

    what: str
    fingerprint: str

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError if the weights differ from those in the checkpoint."""
        if state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"Training cannot be resumed: {self.what} is not the one with which this run started. Give the same model (and "
                "ref_model, if any) as then; the trained weights are loaded from the checkpoint."
            )


@torch.no_grad()
def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of the names, shapes, dtypes and values of all tensors.

    Values are hashed on their own device: with the bytes of a tensor as 64-bit words x_i and odd weights w_i,
    Σ x_i w_i mod 2⁶⁴ changes with any single word.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in weights:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(str(_sums(tensor.detach())).encode())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> list[int]:
    flat = tensor.contiguous().flatten()
    # 64-bit words need an alignment of eight bytes, which a view into another tensor may not have.
    flat = (flat.clone() if flat.storage_offset() * flat.element_size() % 8 else flat).view(torch.uint8)
    words = flat[: len(flat) // 8 * 8].view(torch.int64)
    rest = flat[len(words) * 8 :].tolist()
    totals = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    together = WORDS.get(tensor.device.type, MANY_WORDS)
    for start in range(0, len(words), together):
        chunk = words[start : start + together]
        odd = 2 * torch.arange(start, start + len(chunk), device=tensor.device) + 1
        totals += torch.stack([(chunk * odd).sum(), ((chunk ^ (chunk >> 29)) * (odd * MIX)).sum()])
    return [*totals.tolist(), *rest]


def reference_part(reference: Reference | None, policy: nn.Module, *, moves: bool) -> Stateful | None:
    """The state of a reference for checkpoints: weights if they change (`moves`) or exist nowhere else, else a fingerprint."""
    if isinstance(reference, FrozenModel):
        model = unwrap(reference.model)
        return Weights(model) if moves else Unchanged("the reference policy", fingerprint(shards(model).items()))
    if isinstance(reference, SnapshotReference):
        return StateFunctions(lambda: dict(reference.weights), lambda state: _copy(state, reference.weights))
    if isinstance(reference, AdapterOff):
        frozen = ((name, p) for name, p in policy.named_parameters() if not p.requires_grad)
        return Unchanged("the model below the adapter", fingerprint(frozen))
    return None


@torch.no_grad()
def _copy(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(state[name])


@dataclass
class StateRegistry:
    """The parts of a trainer by name: `shared` ones are the same on all processes, `own` ones differ."""

    shared: dict[str, Stateful] = field(default_factory=dict)
    own: dict[str, Stateful] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)

    def register(self, name: str, part: Stateful, *, per_rank: bool = False, optional: bool = False) -> None:
        """Save and restore `part` with every checkpoint; with `per_rank`, separately for each process.

        A checkpoint without it cannot be resumed, unless it is `optional`.
        """
        (self.own if per_rank else self.shared)[name] = part
        if optional:
            self.optional.add(name)

    def save(self, folder: Path, *, rank: int, is_main: bool) -> None:
        """Write the states of all parts. All processes must call it, since states may be gathered."""
        shared = {name: part.state_dict() for name, part in self.shared.items()}
        torch.save({name: part.state_dict() for name, part in self.own.items()}, folder / f"trl_state_{rank}.pt")
        if is_main and shared:
            torch.save(shared, folder / "trl_state.pt")

    def load(self, folder: Path, *, rank: int, processes: int, written_by: int) -> None:
        """Restore the states of all parts from a checkpoint that was written by `written_by` processes.

        Raises ConfigError if the state of a part is missing, which is also the case for those of single processes if the number
        of processes has changed.
        """
        own = _read_state(folder / f"trl_state_{rank}.pt") if written_by == processes else {}
        found = {**_read_state(folder / "trl_state.pt"), **own}
        parts = {**self.shared, **self.own}
        if lost := sorted(parts.keys() - found.keys() - self.optional):
            why = f"it was written by {written_by} processes, and here are {processes}"
            raise ConfigError(
                f"{str(folder)!r} cannot be resumed: it does not hold the state of {', '.join(lost)} for this process "
                f"({why if written_by != processes else 'it was written by another trainer, or by an earlier version'}). "
                "Resume it with the same trainer, version and number of processes, or start a new run from its weights: give "
                "the folder as the model."
            )
        if written_by != processes:
            logger.warning(
                f"{folder} was written by {written_by} processes, and here are {processes}: random states and metrics since "
                "the last log cannot be restored, so that results differ from those of a run that was never stopped."
            )
        for name, part in parts.items():
            if name in found:
                part.load_state_dict(found[name])


def _read_state(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True, map_location="cpu") if file.exists() else {}
