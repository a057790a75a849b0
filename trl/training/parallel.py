"""Set up and check parallelism: DDP, FSDP2 or DeepSpeed ZeRO, also for processes on CPUs.

A launcher (`trl … --accelerate_config`, `accelerate launch`, or torchrun with the variables of accelerate) sets the kind of
parallelism in environment variables. accelerate reads them only if there is an accelerator. On CPUs, an FSDP configuration
would silently run DDP, and with DeepSpeed, or without `use_cpu`, every process would train alone. This file ensures that

    processes on CPUs communicate over gloo, wait at most `ddp_timeout`, and exit without an abort
    the requested parallelism runs with all processes that were started, or there is an error
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

import torch
from accelerate import Accelerator, DistributedType, PartialState
from torch import Tensor, nn
from transformers import TrainingArguments

from trl.errors import ConfigError

logger = logging.getLogger(__name__)

SHARDING = {
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
}
"""Environment variable of a launcher → the parallelism that it requests."""

EXITED = ("by peer", "remote process exit")
"""Words in error messages of gloo and NCCL when another process has exited."""

LOST = {
    "timed out": "one of them did not arrive within ddp_timeout={limit} s. It hangs, or has more work than this one",
    **dict.fromkeys(EXITED, "one of them has exited. Its own error says why"),
}
"""Words in error messages of gloo and NCCL → what happened."""


def sharding_asked_for(args: TrainingArguments) -> DistributedType | None:
    """The sharding that the launcher, or the arguments `fsdp` and `deepspeed`, request; None for one process or DDP."""
    if args.deepspeed:
        return DistributedType.DEEPSPEED
    if args.fsdp:
        return DistributedType.FSDP
    return next((kind for name, kind in SHARDING.items() if os.environ.get(name, "").lower() == "true"), None)


@contextmanager
def processes_on_cpu(args: TrainingArguments) -> Iterator[None]:
    """Connect the processes of a launch over gloo, and enable the requested sharding, if there is no accelerator.

    `TrainingArguments` must be set up within the context. A single process, or one with an accelerator, is not affected.
    """
    if "LOCAL_RANK" not in os.environ or "MASTER_ADDR" not in os.environ or torch.accelerator.is_available():
        yield
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=args.ddp_timeout))
    atexit.unregister(_wait_for_gloo)
    atexit.register(_wait_for_gloo)
    args.use_cpu = sharding_asked_for(args) is None
    if args.use_cpu:
        yield
        return
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    if sharding_asked_for(args) == DistributedType.DEEPSPEED:
        _disable_compiled_communication()
    plain = PartialState._prepare_backend
    # accelerate allows sharding only for processes that it takes for several GPUs.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = plain


def _wait_for_gloo() -> None:
    """Wait briefly until threads of gloo have released the tensors that they exchanged last.

    A thread that does so while the interpreter shuts down aborts the process ("terminate called without an active
    exception"). `destroy_process_group` does not wait as long as something, such as a sharded model, refers to the group.
    """
    time.sleep(0.1)


def _disable_compiled_communication() -> None:
    """Make DeepSpeed use gloo within one machine, in place of an extension that it would compile for minutes."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_processes(args: TrainingArguments) -> None:
    """Raise ConfigError if processes that were started together would each train alone."""
    started = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if args.world_size != started:
        raise ConfigError(
            f"{started} processes were started, but this one would train in a group of {args.world_size}: accelerate found no "
            f"devices for all of them (use_cpu={args.use_cpu}, device {args.device}). Start as many processes as there are "
            "devices; to train on CPUs, hide the GPUs (CUDA_VISIBLE_DEVICES=)."
        )


def read_on_every_process(args: TrainingArguments) -> None:
    """Let every process read its own batches, whose items are not tensors that could be sent to it, and as many as the others.

    Raises ConfigError for options of `accelerator_config` that ask for something else.
    """
    loaders = args.accelerator_config
    if loaders.dispatch_batches:
        raise ConfigError(
            "accelerator_config: dispatch_batches=True would send batches from one process to the others, but they are not tensors "
            "before they are laid out. Leave it out: every process reads its own rows."
        )
    if not loaders.even_batches and args.world_size > 1:
        raise ConfigError(
            "accelerator_config: even_batches=False would give some processes fewer batches, so that the others wait for them "
            "forever. Leave it out: evaluation does not count the rows that fill up the last batches."
        )
    loaders.dispatch_batches = False


def check_parallelism(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise ConfigError if another parallelism runs than was requested, or FSDP 1."""
    asked, runs = sharding_asked_for(args), accelerator.distributed_type
    if asked is not None and runs != asked:
        raise ConfigError(
            f"The launcher requests {asked.value}, but {runs.value} would run, with all weights on every device. Start "
            "with `accelerate launch` or `trl … --accelerate_config`, without use_cpu if there are accelerators."
        )
    if runs == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("FSDP 1 is not supported: set fsdp_version: 2 in the configuration of accelerate.")


def use_one_device(args: TrainingArguments) -> None:
    """Keep `transformers` from using several devices in one process; warn how to use them all."""
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} devices are visible, but one process was started, which uses one device. To use all, start one process "
            "per device: accelerate launch, torchrun, or trl with --num_processes."
        )
        args._n_gpu = 1


def unduplicated_rows(accelerator: Accelerator, rows: int) -> int:
    """How many of a process's `rows` of an evaluation batch count. The last batch repeats rows, so that all processes have the
    same number; repeated ones do not count."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return max(0, min(rows, state.remainder - accelerator.process_index * rows))


@contextmanager
def explain_waits(args: TrainingArguments, steps: Callable[[], int]) -> Iterator[None]:
    """If waiting for other processes fails, raise an error that says which process waited, in which step, and why."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower() if _is_of_collectives(error) else ""
        reason = next((reason for words, reason in LOST.items() if words in text), None)
        if reason is None:
            raise
        raise RuntimeError(
            f"Process {args.process_index} of {args.world_size} waited for the others in step "
            f"{steps() + 1}: {reason.format(limit=args.ddp_timeout)}."
        ) from error


def tell_exits_shortly(args: TrainingArguments) -> None:
    """With several processes, print one line when this one ends because another has exited, in place of gloo's or NCCL's text.

    A failure in one process ends the waits of the others, wherever they wait: while models are loaded and rows encoded, in
    training, while a model is saved or pushed.
    """
    if args.world_size == 1 or getattr(sys.excepthook, "_tells_exits", False):
        return
    plain = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not has_exited(error):
            plain(kind, error, trace)
            return
        print(
            f"Process {args.process_index} of {args.world_size} ends, since another process has failed: see the error in that "
            "one's output.",
            file=sys.stderr,
        )

    hook._tells_exits = True
    sys.excepthook = hook


def has_exited(error: BaseException | None) -> bool:
    """Whether an error, or the one that caused it, is that of a wait for a process that has exited."""
    if not isinstance(error, RuntimeError):
        return False
    told = _is_of_collectives(error) and any(words in str(error).lower() for words in EXITED)
    return told or has_exited(error.__cause__)


def _is_of_collectives(error: RuntimeError) -> bool:
    """Whether torch.distributed raised an error: other connections, such as that to a hub, are reset by peers, too."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """Backward pass of `loss` without scaling: DeepSpeed would divide it by the number of accumulation steps."""
    options = {"scale_wrt_gas": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    accelerator.backward(loss, **options)


@contextmanager
def accumulating(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Accumulate gradients within the context: they are not reduced over processes, and DeepSpeed does not step."""
    state = accelerator.gradient_state
    if not state.sync_gradients:  # an outer context accumulates already
        yield
        return
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(True)
