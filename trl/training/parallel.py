"""How several processes train together: DDP, FSDP2 or DeepSpeed ZeRO, and what CPUs have to be told about it.

A launcher names the kind of parallelism by environment variables: `trl … --accelerate_config`, `accelerate launch`, or torchrun with
the variables of accelerate. accelerate reads them only where there is an accelerator. On CPUs an FSDP configuration would
silently run DDP, and under DeepSpeed, or without `use_cpu`, every process would take itself for the only one. So here,
and nowhere else:

    processes on CPUs talk over gloo, no wait is longer than `ddp_timeout`, and they exit without an abort
    the parallelism that was asked for is the one that runs, with all processes that were started, or there is an error
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

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
"""Environment variable of a launcher → the parallelism that it asks for."""

LOST = {
    "timed out": "one of them did not come within ddp_timeout={limit} s. It hangs, or has more to do than this one",
    "by peer": "one of them has ended. Its own error says why",
}
"""Words in what gloo and NCCL raise → what happened."""


def sharding_asked_for(args: TrainingArguments) -> DistributedType | None:
    """The parallelism that shards, by the launcher or the arguments `fsdp` and `deepspeed`; None for one process or DDP."""
    if args.deepspeed:
        return DistributedType.DEEPSPEED
    if args.fsdp:
        return DistributedType.FSDP
    return next((kind for name, kind in SHARDING.items() if os.environ.get(name, "").lower() == "true"), None)


@contextmanager
def processes_on_cpu(args: TrainingArguments) -> Iterator[None]:
    """Let the processes of a launch find each other, and their parallelism, where there is no accelerator.

    Options are read within. Nothing changes for a single process, or where there are accelerators.
    """
    if "LOCAL_RANK" not in os.environ or "MASTER_ADDR" not in os.environ or torch.accelerator.is_available():
        yield
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=args.ddp_timeout))
    atexit.unregister(_let_go)
    atexit.register(_let_go)
    args.use_cpu = sharding_asked_for(args) is None
    if args.use_cpu:
        yield
        return
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    if sharding_asked_for(args) == DistributedType.DEEPSPEED:
        _spare_compiling()
    plain = PartialState._prepare_backend
    # What accelerate takes for accelerators that talk is what it lets shard.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = plain


def _let_go() -> None:
    """Give threads of gloo the moment they need to let go of the tensors they exchanged last.

    One that does so while the interpreter takes itself apart aborts the process ("terminate called without an active
    exception"). `destroy_process_group` does not wait for them as long as anything, a sharded model say, knows the group.
    """
    time.sleep(0.1)


def _spare_compiling() -> None:
    """Let DeepSpeed use gloo between processes of one machine, in place of an operation that it compiles for minutes."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_processes(args: TrainingArguments) -> None:
    """Raise ConfigError where processes that were started together would each train on their own."""
    started = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if args.world_size != started:
        raise ConfigError(
            f"{started} processes were started, and this one would train in {args.world_size}: accelerate found no "
            f"device to train on together (use_cpu={args.use_cpu}, device {args.device}). Start as many processes as "
            "there are devices; on CPUs, hide the others (CUDA_VISIBLE_DEVICES=)."
        )


def check_parallelism(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise ConfigError where another parallelism runs than was asked for, or FSDP 1."""
    asked, runs = sharding_asked_for(args), accelerator.distributed_type
    if asked is not None and runs != asked:
        raise ConfigError(
            f"The launcher asks for {asked.value}, and {runs.value} would run, with whole weights on every device. Start "
            "with `accelerate launch` or `trl … --accelerate_config`, without use_cpu where there are accelerators."
        )
    if runs == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("FSDP 1 is not supported: set fsdp_version: 2 in the configuration of accelerate.")


def use_one_device(args: TrainingArguments) -> None:
    """Keep `transformers` from spreading one process over several devices; says how to use them all."""
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} devices are visible, but one process was started: one of them is used. Start one process per "
            "device to use all: accelerate launch, torchrun, or trl with --num_processes."
        )
        args._n_gpu = 1


def unduplicated_rows(args: TrainingArguments, accelerator: Accelerator, rows: int) -> int:
    """How many of a process's `rows` of an evaluation batch count: the last batch repeats some, so that all have as many."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return max(0, min(rows, state.remainder - args.process_index * args.eval_batch_size))


@contextmanager
def explain_waits(args: TrainingArguments, steps: Callable[[], int]) -> Iterator[None]:
    """Where a wait for other processes fails, raise an error that says which process waited, in which step, and why."""
    try:
        yield
    except RuntimeError as error:
        reason = next((reason for words, reason in LOST.items() if words in str(error).lower()), None)
        if reason is None:
            raise
        raise RuntimeError(
            f"Process {args.process_index} of {args.world_size} waited for the others in step "
            f"{steps() + 1}: {reason.format(limit=args.ddp_timeout)}."
        ) from error


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """Gradients of `loss` as it is; DeepSpeed would divide it by the number of accumulated losses."""
    options = {"scale_wrt_gas": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
    accelerator.backward(loss, **options)


@contextmanager
def accumulating(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Backward passes within add up gradients: nothing is exchanged, and DeepSpeed does not step."""
    state = accelerator.gradient_state
    if not state.sync_gradients:  # already so, outside
        yield
        return
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(True)
