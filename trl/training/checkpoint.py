"""Checkpoints: written to a temporary folder, which is renamed when all files are on disk.

    partial-checkpoint-8/ ──all processes have written, every file is synced──▶ checkpoint-8/

So a folder named `checkpoint-N` is always complete, whenever a run is killed. It contains model, optimizer, scheduler and
the random states of every process (as `transformers` writes them), and

    manifest.json           size and hash of every file, to detect files that changed later
    trl_state.pt            states of the trainer that are the same on all processes
    trl_state_R.pt          states of the process with rank R

For these states see `trl.training.state`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash
from accelerate import Accelerator
from safetensors import SafetensorError

from trl.errors import ConfigError, ModelError, suggest
from trl.models.files import SHARDS, WEIGHTS, check_shards, is_cut_short, is_inside
from trl.training.collectives import all_gather_object, run_on_main

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"(replaced-)?checkpoint-([0-9]+)")
PARTIAL, REPLACED = "partial-", "replaced-"
MANIFEST = "manifest.json"
STATE = "trainer_state.json"
OPTIMIZER = re.compile(r"optimizer(_\d+)?(\.pt|\.bin)?|global_step\d+")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HASHERS = 4
"""Number of files that are hashed in parallel."""


class CheckpointError(OSError):
    """A checkpoint could not be written. Earlier checkpoints are unchanged."""


# ---- writing ----


def write_checkpoint(
    folder: Path, write: Callable[[Path], None], accelerator: Accelerator, *, names_it: bool = True
) -> None:
    """Call `write` on all processes with a temporary folder; the process with `names_it` then renames it to `folder`.

    If one process fails, all raise CheckpointError, and the temporary folder is removed.
    """
    beside = folder.with_name(PARTIAL + folder.name)
    if accelerator.is_local_main_process:
        sweep(folder.parent)
    accelerator.wait_for_everyone()
    try:
        with explain_full_disk(folder.parent, folder.name, beside):
            _together(lambda: _write(beside, write), folder, accelerator)
            _together(
                lambda: publish(beside, folder, accelerator.num_processes) if names_it else None, folder, accelerator
            )
    except Exception:
        accelerator.wait_for_everyone()  # all processes fail together, and some still read the folder
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _write(beside: Path, write: Callable[[Path], None]) -> None:
    beside.mkdir(parents=True, exist_ok=True)
    write(beside)


def _together(action: Callable[[], None], folder: Path, accelerator: Accelerator) -> None:
    """Run `action` on every process and wait for all; if it fails on one, raise an error on all."""
    failure: Exception | None = None
    try:
        action()
    except Exception as error:  # raised below, after the other processes have been told
        failure = error
    failed = sum(all_gather_object(failure is not None, accelerator))
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"{str(folder)!r} was not written: it failed on {failed} of the other processes.")


def publish(beside: Path, folder: Path, processes: int = 1) -> None:
    """Write the manifest of `beside`, sync all files to disk, and rename it to `folder`, replacing a folder of that name."""
    paths = [path for path in sorted(beside.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(HASHERS) as pool:
        hashes = pool.map(hash_of, paths)
        files = {
            str(path.relative_to(beside)): {"bytes": path.stat().st_size, "hash": each}
            for path, each in zip(paths, hashes, strict=True)
        }
    (beside / MANIFEST).write_text(json.dumps({"processes": processes, "files": files}, indent=1))
    for path in (*beside.rglob("*"), beside):
        _sync(path)
    if os.path.lexists(folder):
        replaced = folder.with_name(REPLACED + folder.name)
        remove(replaced)
        os.rename(folder, replaced)
    os.rename(beside, folder)
    _sync(folder.parent)
    sweep(folder.parent)


def hash_of(file: Path) -> str:
    """A hash of a file's content (XXH3, which detects accidental changes but not forgery)."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, as far as it can be removed."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows cannot sync folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(run: Path) -> None:
    """Remove the remains of interrupted writing: partial checkpoints, and those that were replaced."""
    if not run.is_dir():
        return
    for path in run.iterdir():
        whole = path.with_name(path.name.removeprefix(REPLACED))
        is_replaced = path.name.startswith(f"{REPLACED}checkpoint-") and whole.exists()
        if path.name.startswith(f"{PARTIAL}checkpoint-") or is_replaced:
            remove(path)


def rotate(newest: Path, limit: int | None, best: str | None, sound: int | None = None) -> None:
    """Remove the oldest checkpoints of a run, keeping `limit` of them. The `newest` and the `best` are always kept, and if
    training has diverged, also the last one up to `sound`, the last step before that."""
    if not limit:
        return
    found = [path for path in checkpoints(newest.parent) if path.is_dir() and not path.is_symlink()]
    kept = {newest} | {path for path in found if str(path) == best}
    if sound is not None:
        kept.update([path for path in found if _step_of(path) <= sound][:1])
    others = [path for path in found if path not in kept]
    for path in others[max(0, limit - len(kept)) :]:
        beside = path.with_name(PARTIAL + path.name)
        os.rename(path, beside)
        shutil.rmtree(beside, ignore_errors=True)


def _step_of(checkpoint: Path) -> int:
    return int(CHECKPOINT.fullmatch(checkpoint.name)[2])


def remove_checkpoints(run: str | Path) -> None:
    """Remove all checkpoints in the output folder of an earlier run."""
    for path in checkpoints(run):
        logger.info(f"Removing {path}, of an earlier run (overwrite_output_dir).")
        shutil.rmtree(path)


# ---- finding ----


def checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints in a folder, complete or not, newest first."""
    if not Path(folder).is_dir():
        return []
    named = [(found, path) for path in Path(folder).iterdir() if (found := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(named, key=lambda pair: (-int(pair[0][2]), pair[0][1] or ""))]


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in the output folder of a run that can be resumed; None if there is none.

    Skipped checkpoints are logged with the reason.
    """
    for checkpoint in checkpoints(folder):
        if not (reason := why_not_resumable(checkpoint)):
            return checkpoint
        logger.warning(f"Skipping {checkpoint}: {reason}.")
    return None


def why_not_resumable(checkpoint: Path) -> str:
    """Why a checkpoint cannot be resumed; empty if it can.

    All files of its manifest must be present and unchanged, and include the trainer's state, weights and the optimizer's
    state. A checkpoint without a manifest, from another library, is checked by the names and sizes of its files.
    """
    if not checkpoint.is_dir():
        return "it is a broken link" if checkpoint.is_symlink() else "it is not a folder"
    try:
        return _changed_file(checkpoint) or _missing_part(checkpoint)
    except ModelError as error:
        return f"its weights cannot be trusted ({error})"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"


def _changed_file(checkpoint: Path) -> str:
    """How the files differ from the manifest; empty if they do not."""
    try:
        files = read_manifest(checkpoint).get("files", {})
    except ValueError:
        return f"{MANIFEST} is incomplete"
    for name, written in files.items():
        path = checkpoint / name
        if not is_inside(name):
            return f"{MANIFEST} names {name!r}, which is outside of its folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != written["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, but was written with {written['bytes']:,}"
    for name, written in files.items():
        if hash_of(checkpoint / name) != written["hash"]:
            return f"{name} has changed since it was written"
    return ""


def _missing_part(checkpoint: Path) -> str:
    """What is missing for resuming from a checkpoint; empty if nothing is."""
    check_shards(checkpoint)
    paths = list(checkpoint.rglob("*"))
    names = [path.name for path in paths]
    if STATE not in names:
        return f"{STATE} is missing, so writing it was interrupted"
    if not isinstance(json.loads((checkpoint / STATE).read_text()).get("global_step"), int):
        return f"{STATE} does not say at which step it was written"
    weights = [path for path in paths if WEIGHTS.fullmatch(path.name) or SHARDS.fullmatch(path.name)]
    if not weights:
        return "it holds no weights"
    for path in weights:
        if path.suffix == ".safetensors" and is_cut_short(path):
            return f"{path.name} is cut short"
    if not any(map(OPTIMIZER.fullmatch, names)):
        return "it holds no optimizer state" + (" (save_only_model was set)" if read_manifest(checkpoint) else "")
    return ""


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest that `publish` wrote; empty if there is none. Raises ValueError for a damaged manifest."""
    file = checkpoint / MANIFEST
    found = json.loads(file.read_text()) if file.exists() else {}
    files = found.get("files", {}) if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(isinstance(each, dict) for each in files.values()):
        raise ValueError(f"{MANIFEST} has no table of files")
    return found


def resolve_checkpoint(asked: str | Path | bool | None, run: str) -> str | None:
    """The folder that `resume_from_checkpoint` refers to; None to start from the beginning.

    True is the newest complete checkpoint in `run`; so is "last", which starts from the beginning if there is none. All
    processes use what the main process finds. Raises ConfigError for a checkpoint that does not exist or is incomplete.
    """
    return None if asked in (None, False) else run_on_main(lambda: _find(asked, run))


def _find(asked: str | Path | bool, run: str) -> str | None:
    if asked is not True and asked != "last":
        return check_checkpoint(asked)
    newest = newest_checkpoint(run)
    if newest is not None:
        logger.info(f"Resuming from {newest}.")
        return str(newest)
    if asked == "last":
        logger.info(f"There is no checkpoint to resume in {run!r}: starting from the beginning.")
        return None
    raise ConfigError(
        f"resume_from_checkpoint=True: there is no complete checkpoint in {run!r}. Start from the beginning "
        "(resume_from_checkpoint=None), or give 'last', which does so if there is no checkpoint."
    )


def check_checkpoint(folder: str | Path) -> str:
    """The path of a checkpoint. Raises ConfigError if it does not exist or is incomplete."""
    path, given = Path(folder).expanduser(), f"resume_from_checkpoint={str(folder)!r}"
    if not path.is_dir():
        beside = [str(each) for each in checkpoints(path.parent)]
        raise ConfigError(f"{given}: there is no such folder.{suggest(str(path), beside)}")
    if inside := checkpoints(path):
        raise ConfigError(f"{given} is the output folder of a run. Did you mean {str(inside[0])!r}?")
    if not any(path.iterdir()):
        raise ConfigError(f"{given} is an empty folder: name a checkpoint-… folder of a run.")
    if reason := why_not_resumable(path):
        raise ConfigError(f"{given} cannot be resumed: {reason}.")
    return str(path)


# ---- full disks ----


@contextmanager
def explain_full_disk(run: str | Path, name: str, beside: Path | None = None) -> Iterator[None]:
    """Turn the various errors of a full disk into a CheckpointError, which says where, how much is needed, and what remains.

    `name` is written to the folder `run`, first as the temporary folder `beside`.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, CheckpointError) or not _is_full_disk(error):
            raise
        raise CheckpointError(_no_space(Path(run), name, beside)) from error


def _no_space(run: Path, name: str, beside: Path | None) -> str:
    written = 0 if beside is None else _size(beside)
    free = shutil.disk_usage(run).free + written
    good = next((path for path in checkpoints(run) if not why_not_resumable(path)), None)
    about = (
        f"about {_size(good) / 1e6:,.1f} MB" if good and _size(good) > written else f"more than {written / 1e6:,.1f} MB"
    )
    needed = f"that needs {about}, and " if written or good else ""
    remains = (
        "There is no complete checkpoint."
        if good is None
        else f"{good} is complete: make room, then resume with --resume."
    )
    return (
        f"No space left on the disk of {str(run)!r} while {name} was written: {needed}{free / 1e6:,.1f} MB "
        f"are free. {remains} save_total_limit=N keeps only the newest N checkpoints, save_only_model=true leaves out "
        "the optimizer."
    )


def _size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_full_disk(error: BaseException) -> bool:
    """Whether an error, or one of its causes, comes from a full disk, a quota or a limit of file sizes.

    safetensors has the error number only in its message, and torch's archive writer only says that writing failed.
    """
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(each, OSError) and each.errno in FULL for each in chain):
        return True
    words = re.compile(rf"os error ({'|'.join(map(str, FULL))})\b")
    if any(isinstance(each, SafetensorError) and words.search(str(each)) for each in chain):
        return True
    return any("inline_container" in str(each) or "iostream" in str(each) for each in chain)
