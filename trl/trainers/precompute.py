"""Computes the reference's log-probabilities of a dataset once, and caches them on disk.

They become a column `ref_logprobs` of the encoded rows, one number per token of each completion. The cache's key is a hash
of what they depend on: the values of the reference's weights, the encoded rows, and the precision.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from tqdm.auto import tqdm

from trl.data.encode import decode
from trl.errors import ConfigError
from trl.models.patching import evaluating
from trl.models.reference import AdapterOff, FrozenModel, Reference
from trl.models.score import unwrap
from trl.training.collectives import all_gather_object
from trl.training.state import fingerprint
from trl.training.window import plan_micro_batches
from trl.types import Example

if TYPE_CHECKING:
    from trl.trainers.base import BaseTrainer

logger = logging.getLogger(__name__)

COLUMN = "ref_logprobs"
_FORMAT = 2
"""Version of the computation, part of the cache's key: increase it when results change."""

Logprobs = list[list[float]]
"""Log-probabilities of one row: a list for each completion, with a number per token."""


def with_reference_logprobs(
    trainer: BaseTrainer, reference: Reference, rows: Dataset, *, name: str, batch_size: int
) -> Dataset:
    """Add the column `ref_logprobs` to encoded rows, from the cache on disk if there is one for them.

    Raises ConfigError for a stream, which cannot be read twice.
    """
    if not isinstance(rows, Dataset):
        raise ConfigError(
            f"precompute_ref_log_probs reads {name!r} before training, but it is a stream: load it without streaming."
        )
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trl_reference" / cache_key(trainer, reference, rows)
    if _all_have(folder, trainer):
        logger.info(f"Reference log-probabilities of {name!r} are read from {folder}.")
    else:
        found = compute(trainer, reference, rows, name=name, batch_size=batch_size)
        if trainer.is_local_process_zero():
            _store(found, folder)
        trainer.accelerator.wait_for_everyone()
    return concatenate_datasets([rows, _read(folder, len(rows))], axis=1)


def _all_have(folder: Path, trainer: BaseTrainer) -> bool:
    """Whether all processes, on all machines, find a valid cache; if one does not, all of them compute."""
    return all(all_gather_object(_is_whole(folder), trainer.accelerator))


def _is_whole(folder: Path) -> bool:
    """Whether there is a cache that can be read; a damaged one is removed, with a warning."""
    if not folder.exists():
        return False
    try:
        _read(folder).data.table.validate(full=True)
    except Exception as error:  # damaged files may raise anything
        logger.warning(f"The cache {folder} is damaged ({type(error).__name__}: {error}): computing it anew.")
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _read(folder: Path, count: int | None = None) -> Dataset:
    found = datasets.load_from_disk(str(folder))
    if found.column_names != [COLUMN] or count not in (None, len(found)):
        raise ValueError(f"{folder} does not hold {COLUMN} of {count} rows")
    return found


def _store(found: list[Logprobs], folder: Path) -> None:
    """Write atomically: to a temporary folder, which is then renamed."""
    if folder.exists():
        return
    column = Dataset.from_dict({COLUMN: found}, features=Features({COLUMN: List(List(Value("float32")))}))
    partial = folder.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
    column.save_to_disk(str(partial))
    try:
        partial.rename(folder)
    except OSError:  # another run has stored the same numbers meanwhile
        shutil.rmtree(partial, ignore_errors=True)


def cache_key(trainer: BaseTrainer, reference: Reference, rows: Dataset) -> str:
    """A hash of everything that the log-probabilities depend on."""
    model = reference.model if isinstance(reference, FrozenModel) else trainer.model
    config = {
        k: v for k, v in unwrap(model).config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
    }
    precision = (trainer.args.bf16, trainer.args.fp16)
    adapter_is_off = isinstance(reference, AdapterOff)
    weights = fingerprint((n, t) for n, t in _tensors(model) if not (adapter_is_off and t.requires_grad))
    named = (trainer.args.ref_adapter_name, type(reference).__name__)
    return Hasher.hash((_FORMAT, rows._fingerprint, precision, config, named, weights))


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from sorted(model.named_parameters())
    yield from sorted(model.named_buffers())


def compute(trainer: BaseTrainer, reference: Reference, rows: Dataset, *, name: str, batch_size: int) -> list[Logprobs]:
    """Log-probabilities of every row, longest rows first; processes share the work."""
    state = trainer.accelerator
    mine = list(range(state.process_index, len(rows), state.num_processes))
    lengths = rows.select_columns([name for name in ("prompt_ids", "completion_ids") if name in rows.column_names])
    sizes = [decode(lengths[i])[0].tokens for i in mine]
    count = -(-len(mine) // batch_size)
    groups = plan_micro_batches(sizes, count=count, token_budget=trainer.micro_batch_budget())
    found: dict[int, Logprobs] = {}
    hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    progress = tqdm(total=len(mine), desc=f"Reference of {name}", unit="row", disable=hidden)
    with progress, evaluating(trainer.model):
        for group in groups:
            chosen = [mine[k] for k in group]
            examples = trainer.to_examples([rows[i] for i in chosen])
            found |= dict(zip(chosen, _logprobs(trainer, reference, examples), strict=True))
            progress.update(len(chosen))
    merged = {i: logprobs for part in all_gather_object(found, state) for i, logprobs in part.items()}
    return [merged[i] for i in range(len(rows))]


def _logprobs(trainer: BaseTrainer, reference: Reference, examples: list[Example]) -> list[Logprobs]:
    batch = trainer.collate(examples).to(trainer.args.device)
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():  # the policy is not prepared yet
        table = iter(reference.logprobs(trainer.model, batch).float().cpu())
    return [[next(table)[: len(c)].tolist() for c in example.completions] for example in examples]
