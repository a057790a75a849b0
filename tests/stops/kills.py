"""Kill a tiny run, checkpoint writing included, go on until it is finished, and compare with one that was never stopped.

    python -m tests.stops.kills --kills 100            at random moments
    python -m tests.stops.kills --aimed                at every touch of the disk while a checkpoint is written
    python -m tests.stops.kills --run grpo             another trainer, see tests/stops/runs.py

Every attempt is a process of its own, forked from this one, which has imported everything and started no thread.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from tests.stops.runs import RUNS, StopAt, found
from trl.training.checkpoint import PARTIAL, newest_checkpoint

OPTIONS = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
PHASES = ("starting", "training step", "writing checkpoint", "after checkpoint")
RESULT = "result.json"
AIMED_AT = 3
"""The checkpoint while which is written the aimed kills come; steps before it are done once."""


class Board:
    """What a process tells the one above, at any moment: its phase, its step, and its last whole checkpoint."""

    FORMAT = "iiii"

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 64)

    def write(self, phase: int, step: int, *, saved: int | None = None, touches: int | None = None) -> None:
        _, _, saved_, touches_ = self.read()
        values = phase, step, saved_ if saved is None else saved, touches_ if touches is None else touches
        struct.pack_into(self.FORMAT, self.memory, 0, *values)

    def read(self) -> tuple[int, ...]:
        return struct.unpack_from(self.FORMAT, self.memory, 0)


class Tell(TrainerCallback):
    def __init__(self, board: Board) -> None:
        self.board = board

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.board.write(1, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.board.write(2, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.board.write(3, state.global_step, saved=state.global_step)


@dataclass(frozen=True)
class Kill:
    """One line of the table."""

    run: int
    moment: str
    resumed_from: int
    whole_before: int
    """The last checkpoint that was whole when the kill came."""

    @property
    def lost_nothing(self) -> bool:
        return self.resumed_from >= self.whole_before


class Attempts:
    """Processes that train in a folder from its newest good checkpoint, each a fork of this one.

    The trainer is made once, before: a process begins with one that has not been used.
    """

    def __init__(self, name: str, folder: Path, max_steps: int) -> None:
        self.folder, self.board = folder, Board()
        torch.set_num_threads(1)
        tqdm.set_lock(
            threading.RLock()
        )  # its own is one for all forks: who is killed holding it stops those that follow
        self.trainer = RUNS[name](folder, [Tell(self.board)], max_steps=max_steps, **OPTIONS)
        self.trainer.save_model(str(folder.with_name("warm")))  # what is only slow the first time
        gc.freeze()

    def start(self, *, stop_at: int | None = None, die_at: int | None = None) -> int:
        """Start a process that trains to the end, or to a step; gives its number."""
        sys.stdout.flush()
        if process := os.fork():
            return process
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(self.folder.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            _count_touches(self.board, die_at)
            if stop_at is not None:
                self.trainer.add_callback(StopAt(stop_at))
            self.trainer.train(resume_from_checkpoint="last")
            (self.folder / RESULT).write_text(json.dumps(fingerprint(self.trainer)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def finish(self, process: int) -> dict[str, Any]:
        """What a process ends with."""
        os.waitpid(process, 0)
        return self.result()

    def result(self) -> dict[str, Any]:
        """What the run ended with. Raises RuntimeError with what its process said, if it failed."""
        file = self.folder / RESULT
        if not file.exists():
            raise RuntimeError(self.folder.with_suffix(".err").read_text()[-3000:])
        return json.loads(file.read_text())

    def newest(self) -> int:
        """The step of the newest good checkpoint; 0 without one."""
        checkpoint = newest_checkpoint(self.folder)
        return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])

    def clear(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.folder)
        self.board.write(0, 0, saved=0)


def _count_touches(board: Board, die_at: int | None) -> None:
    """Count what touches the disk while the checkpoint that is aimed at is written; die at number `die_at`."""
    touches = 0

    def hook(event: str, _: Any) -> None:
        nonlocal touches
        if event != "open" and not event.startswith(("os.", "shutil.")):
            return
        phase, step, *_ = board.read()
        if phase == 2 and step == AIMED_AT:
            touches += 1  # before the kill, which is an event, too
            board.write(phase, step, touches=touches)
            if touches == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def fingerprint(trainer: Any) -> dict[str, Any]:
    """The bytes of the weights, hashed, and what was logged."""
    weights, log = found(trainer)
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return {"weights": digest.hexdigest(), "log": log}


def random_kills(
    name: str, count: int, root: Path, *, seed: int = 0, max_steps: int = 7
) -> Iterator[tuple[Kill, bool]]:
    """Kills at random moments, and whether the run that each belongs to ended as the one that was never stopped."""
    numbers, attempts = random.Random(seed), Attempts(name, root / "run", max_steps)
    start = time.monotonic()
    expected = attempts.finish(attempts.start())
    longest, left, run = time.monotonic() - start, count, 0
    while left:
        attempts.clear()
        run, kills, ended = run + 1, [], False
        while not ended:
            attempts.board.write(0, 0)
            process = attempts.start()
            if len(kills) < left and _killed(process, numbers.uniform(0, 0.6) * longest):
                phase, step, saved, _ = attempts.board.read()
                kills.append(Kill(run, f"{PHASES[phase]} {step or ''}".strip(), attempts.newest(), saved))
            else:
                ended = True
                if len(kills) == left:
                    attempts.finish(process)
        equal, left = attempts.result() == expected, left - len(kills)
        yield from ((kill, equal) for kill in kills)


def _killed(process: int, seconds: float) -> bool:
    """Kill a process after a while; False if it had ended before."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(min(left, 0.002))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def aimed_kills(name: str, root: Path, *, every: int = 1, max_steps: int = 4) -> Iterator[tuple[Kill, bool]]:
    """A kill at every so many touches of the disk while a checkpoint is written, and others are there."""
    attempts, before = Attempts(name, root / "run", max_steps), root / "before"
    attempts.finish(attempts.start(stop_at=AIMED_AT - 1))
    attempts.folder.rename(before)
    (before / RESULT).unlink()
    shutil.copytree(before, attempts.folder)
    expected = attempts.finish(attempts.start())
    touches = attempts.board.read()[3]
    for number in range(1, touches + 1, every):
        attempts.clear()
        shutil.copytree(before, attempts.folder)
        attempts.board.write(0, 0, saved=AIMED_AT - 1)
        _, status = os.waitpid(attempts.start(die_at=number), 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(attempts.folder.with_suffix(".err").read_text()[-3000:])
        left = (
            " beside a partial one" if any(each.name.startswith(PARTIAL) for each in attempts.folder.iterdir()) else ""
        )
        saved = attempts.board.read()[2]
        kill = Kill(number, f"touch {number} of {touches}{left}", attempts.newest(), saved)
        yield kill, attempts.finish(attempts.start()) == expected


def print_table(lines: Iterator[tuple[Kill, bool]]) -> list[tuple[Kill, bool]]:
    """Print a line for every kill as it is known; gives them."""
    print(f"{'':>4} {'run':>4}  {'killed':<38} {'resumed from':<16} equal to the bit")
    lines_ = []
    for kill, equal in lines:
        lines_.append((kill, equal))
        start = f"checkpoint-{kill.resumed_from}" if kill.resumed_from else "the beginning"
        print(f"{len(lines_):>4} {kill.run:>4}  {kill.moment:<38} {start:<16} {'yes' if equal else 'NO'}")
    writing = sum("writing" in kill.moment or "touch" in kill.moment for kill, _ in lines_)
    print(
        f"{len(lines_)} kills of {len({kill.run for kill, _ in lines_})} runs, {writing} of them while a checkpoint was "
        f"written: {sum(equal for _, equal in lines_)} ended as the run that was never stopped."
    )
    return lines_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="sft", choices=RUNS)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--aimed", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="with --aimed: at every so many touches of the disk")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        if given.aimed:
            lines = print_table(aimed_kills(given.run, Path(root), every=given.every))
        else:
            lines = print_table(random_kills(given.run, given.kills, Path(root), seed=given.seed))
    sys.exit(not all(equal and kill.lost_nothing for kill, equal in lines))


if __name__ == "__main__":
    main()
