"""Stopping and going on: a signal ends a run with a checkpoint, and the newest good checkpoint is found again.

    with stop_on_signal(trainer) as stop:
        trainer.train(resume_from_checkpoint=newest_checkpoint(output_dir))
    if stop.signal is not None: …

The first SIGINT (Ctrl-C) or SIGTERM lets the optimizer step finish, writes a checkpoint and ends training; the second
ends it at once. A checkpoint that was cut short is known by its files: it is passed over when a run goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import struct
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SAME_SIGNAL = 0.5
"""Seconds in which a terminal and a launcher may both deliver one Ctrl-C."""
LITTLE = 2**20
"""Bytes; a disk with less is full."""
FIRST_WORDS = "\nFinishing this step, then writing a checkpoint. Once more stops at once, without one.\n"


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint. See `stop_on_signal`."""

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self.signal: int | None = None
        """The signal that training was ended for; None if it ran to its end."""

    def receive(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals."""
        if self.received and time.monotonic() - self._since < SAME_SIGNAL:
            return
        if self.received:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.received, self._since = number, time.monotonic()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, FIRST_WORDS.encode())  # print may be interrupted in the middle of a line of its own

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        number = self._received_anywhere(args)
        if number and state.global_step < state.max_steps:
            self.signal = number
            control.should_save = control.should_training_stop = True
        return control

    def _received_anywhere(self, args: TrainingArguments) -> int:
        """The signal that this process received or another, so that all end after the same step; 0 if none did."""
        if args.world_size == 1:
            return self.received
        number = torch.tensor([self.received], device=args.device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)


@contextmanager
def stop_on_signal(trainer: Trainer) -> Iterator[StopOnSignal]:
    """Let `trainer.train()` end with a checkpoint when a signal comes. Handlers are put back afterwards.

    Outside the main thread, where Python handles no signals, nothing changes.
    """
    stop = StopOnSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    trainer.add_callback(stop)
    before = {number: signal.signal(number, stop.receive) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(stop)


# ---- going on ----


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest good checkpoint in the output folder of a run; None if there is none.

    Those that are passed over, because they were cut short, are logged with the reason.
    """
    for checkpoint in checkpoints(folder):
        if not (reason := why_not_resumable(checkpoint)):
            return checkpoint
        logger.warning(f"{checkpoint} is passed over: {reason}.")
    return None


def checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints in a folder, good or not, newest first."""
    if not Path(folder).is_dir():
        return []
    numbered = [(int(found[1]), path) for path in Path(folder).iterdir() if (found := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def why_not_resumable(checkpoint: Path) -> str:
    """Why training cannot go on from a checkpoint; empty if it can.

    A good one has the trainer's state (written last), weights, and the optimizer's state, each of them whole.
    """
    files = {path.name: path for path in checkpoint.iterdir()}
    if "trainer_state.json" not in files or not _is_json(files["trainer_state.json"]):
        return "trainer_state.json is missing or incomplete, so writing it was interrupted"
    sharded = any(
        re.fullmatch(r"global_step\d+|pytorch_model_fsdp_\d+", name) and files[name].is_dir() for name in files
    )
    if not sharded and (reason := _weights_missing(files)):
        return reason
    if not sharded and not any(re.fullmatch(r"optimizer(_\d+)?(\.pt|\.bin)?", name) for name in files):
        return "it holds no optimizer state (save_only_model was set, or writing it was interrupted)"
    torn = [path.name for path in files.values() if path.suffix in (".pt", ".bin") and _is_torn_archive(path)]
    return f"{', '.join(torn)} is incomplete" if torn else ""


def _weights_missing(files: Mapping[str, Path]) -> str:
    indices = [path for name, path in files.items() if name.endswith(".index.json")]
    if indices and not all(map(_is_json, indices)):
        return "the index of its weights is incomplete"
    needed = {shard for path in indices for shard in json.loads(path.read_text())["weight_map"].values()}
    if lost := sorted(needed - set(files)):
        return f"{lost[0]} is missing"
    tensors = [path for path in files.values() if path.suffix == ".safetensors"]
    if torn := [path.name for path in tensors if _is_torn_safetensors(path)]:
        return f"{torn[0]} is incomplete"
    named = re.compile(r"((adapter_)?model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)")
    return "" if any(map(named.fullmatch, files)) else "it holds no weights"


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except ValueError:
        return False


def _is_torn_safetensors(path: Path) -> bool:
    """A file starts with the length of its header (8 bytes), then the header, which says where tensors end."""
    data = path.open("rb")
    with data:
        start = data.read(8)
        if len(start) < 8:
            return True
        (length,) = struct.unpack("<Q", start)
        if path.stat().st_size < 8 + length:
            return True
        header = json.loads(data.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size < 8 + length + max(ends, default=0)


def _is_torn_archive(path: Path) -> bool:
    """torch writes zip files, whose table of contents comes last."""
    return not zipfile.is_zipfile(path)


# ---- full disks ----


@contextmanager
def full_disk_explained(folder: str | Path) -> Iterator[None]:
    """Turn what a full disk makes writers raise into one OSError that says where, and what remains to go on from."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_full_disk(error, folder):
            raise
        good = [path for path in checkpoints(folder) if not why_not_resumable(path)]
        remains = f"{good[0]} is whole: make room, then go on with --resume" if good else "No checkpoint is whole"
        raise OSError(
            f"No space left on the disk of {str(folder)!r} while a checkpoint was written. {remains}. "
            "save_total_limit=N keeps only the newest N checkpoints, save_only_model=true leaves out the optimizer."
        ) from error


def _is_full_disk(error: BaseException, folder: str | Path) -> bool:
    """Whether an error, or one that it came from, says that a disk or a quota is full.

    safetensors says so in words only, and torch's writer of archives says no more than that it failed.
    """
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in chain):
        return True
    if any(isinstance(each, SafetensorError) and re.search(r"os error (28|122)\b", str(each)) for each in chain):
        return True
    failed_to_write = any("inline_container" in str(each) or "iostream" in str(each) for each in chain)
    return failed_to_write and shutil.disk_usage(folder).free < LITTLE
