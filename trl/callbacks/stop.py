"""End a run with a checkpoint when a signal arrives.

    with exit_on_signal(trainer):
        trainer.train(resume_from_checkpoint="last")
    trainer.save_model()

The first SIGINT (Ctrl-C), SIGTERM, SIGUSR1 (what clusters send before they take a machine away), SIGHUP (a terminal that
closed), SIGXCPU (a limit on CPU time) or SIGQUIT lets the optimizer step finish, writes a checkpoint and ends training; the
second signal ends training at once. The program then exits with status 128 + the signal's number, such as 130 or 143, and
prints how to resume: by the same command, since "last" is the newest good checkpoint, or the beginning if there is none. With
`stop_on_signal` the program continues after the block, and can decide for itself.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl.callbacks.signals import handled, handling

SAME_SIGNAL = 0.5
"""Seconds within which repeated signals count as one: a terminal and a launcher may both deliver the same Ctrl-C."""
FIRST_WORDS = "\nFinishing this step, then writing a checkpoint. Once more stops at once, without one.\n"


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint after the step in which a signal arrived. See `stop_on_signal`."""

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self.signal: int | None = None
        """The signal that ended training; None if it ran to its end."""

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received and time.monotonic() - self._since < SAME_SIGNAL:
            return
        if self.received:
            for each in handled():
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.received, self._since = number, time.monotonic()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):  # stderr may be closed
                os.write(2, FIRST_WORDS.encode())  # not `print`, which is not reentrant and may itself be interrupted

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        number = self._received_anywhere(args)
        if number and state.global_step < state.max_steps:
            self.signal = number
            control.should_save = control.should_training_stop = True
        return control

    def _received_anywhere(self, args: TrainingArguments) -> int:
        """The signal that any process has received, so that all end after the same step; 0 if none has."""
        if args.world_size == 1:
            return self.received
        number = torch.tensor([self.received], device=args.device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)


@contextmanager
def stop_on_signal(trainer: Trainer) -> Iterator[StopOnSignal]:
    """Within it, `trainer.train()` ends with a checkpoint when a signal arrives. Signal handlers are restored afterwards.

    Has no effect outside the main thread, where Python does not handle signals.
    """
    stop = StopOnSignal()
    trainer.add_callback(stop)
    try:
        with handling(dict.fromkeys(handled(), stop.receive)):
            yield stop
    finally:
        trainer.remove_callback(stop)


@contextmanager
def exit_on_signal(trainer: Trainer) -> Iterator[StopOnSignal]:
    """As `stop_on_signal`, and exit the program after the block if a signal ended training in it.

    Raises SystemExit(128 + the signal's number). A launcher of several processes exits with its own status.
    """
    with stop_on_signal(trainer) as stop:
        yield stop
    if stop.signal is None:
        return
    with suppress(OSError, ValueError, AttributeError):  # stderr may be closed
        if trainer.is_world_process_zero():
            print(f"Stopped, with a checkpoint. To resume:\n\n    {command()}\n", file=sys.stderr)
    trainer.accelerator.end_training()
    raise SystemExit(128 + stop.signal)


def command() -> str:
    """The command line of this program, or of the launcher of its processes."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return shlex.join(psutil.Process().parent().cmdline() if launched else sys.orig_argv)
