"""Checks of options against devices, installed packages and each other, when a configuration is made, before loading."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from trl.counts import counted
from trl.errors import ConfigError, MissingPackageError, suggest
from trl.imports import check_available, is_available
from trl.ops.products import has_bfloat16

logger = logging.getLogger(__name__)

INTERVALS = ("logging", "eval")
"""Intervals that cannot be 0 steps. save_steps=0 saves at the end of training alone, as in `transformers`."""

OPTIMIZERS = {
    r"adamw_(bnb_)?8bit|rmsprop_bnb.*|(paged_)?(lion|ademamix)_(8|32)bit|paged_adamw_(8|32)bit|ademamix": "bitsandbytes",
    r"galore_adamw_8bit.*": "bitsandbytes",
    r"adamw_torch_[48]bit": "torchao",
    r"galore_.*": "galore_torch",
    r"apollo_.*": "apollo_torch",
    r"(ada)?lomo": "lomo_optim",
    r"schedule_free_.*": "schedulefree",
    r"stable_adamw": "optimi",
    r"grokadamw": "grokadamw",
    r"adamw_torch_xla": "torch_xla",
    r"adamw_torch_npu_fused": "torch_npu",
    r"adamw_anyprecision": "torchdistx",
}
"""Expression for names of optimizers → the module that they need."""

TRACKERS = {
    "azure_ml": "pip install azureml-sdk",
    "flyte": "pip install flytekit",
    "kubeflow": "run in a job of Kubeflow, which sets KUBEFLOW_TRAINER_SERVER_URL",
}
"""Tracker → how to make it available, where that is not `pip install` and its name."""


def check_intervals(args: TrainingArguments) -> None:
    """Raises ConfigError for an interval of 0 steps, and for max_steps=0."""
    if args.max_steps == 0:
        raise ConfigError("max_steps=0 trains nothing: give 1 or more, or leave it out to train num_train_epochs.")
    for name in INTERVALS:
        strategy = getattr(args, f"{name}_strategy")
        if getattr(strategy, "value", strategy) == "steps" and getattr(args, f"{name}_steps") == 0:
            raise ConfigError(
                f"{name}_steps=0: give a number of steps, a fraction of all steps, or --{name}_strategy no for none."
            )


def check_full_batch(args: TrainingArguments, rows: int) -> None:
    """Raises ConfigError if dataloader_drop_last would drop the only batch."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise ConfigError(
            f"dataloader_drop_last=True drops an incomplete last batch, and {counted(rows, 'row')} do not fill a single one "
            f"of {batch:,}: leave it out, or set a smaller per_device_train_batch_size."
        )


def check_best(args: TrainingArguments) -> None:
    """Raises ConfigError if the best checkpoint is asked for, but checkpoints are not evaluated or no metric is named."""
    evaluates, saves = (getattr(each, "value", each) for each in (args.eval_strategy, args.save_strategy))
    has_metric = args.metric_for_best_model is not None or args.load_best_model_at_end
    if saves == "best" and not (has_metric and evaluates != "no"):
        raise ConfigError(
            "save_strategy='best' saves when a metric of the evaluation improves: set metric_for_best_model (eval_loss, for "
            "instance) and eval_strategy."
        )
    if args.load_best_model_at_end and saves not in ("best", evaluates):
        raise ConfigError(
            f"load_best_model_at_end=True needs an evaluation for every checkpoint, but eval_strategy is {evaluates!r} and "
            f"save_strategy {saves!r}: set both to the same, --eval_strategy epoch --save_strategy epoch for instance."
        )


def leave_mps(args: TrainingArguments) -> None:
    """Train on the CPU where the accelerator is Apple's: it has no float64, in which metrics are summed and samples are drawn."""
    if torch.backends.mps.is_available() and not args.use_cpu:
        args.use_cpu = True
        logger.warning("Training on the CPU, since Apple's GPU (mps) does not compute in float64, which metrics need.")


def check_precision(args: TrainingArguments) -> None:
    """Raises ConfigError for bf16 and fp16 at once, and for a precision that the device does not support."""
    if args.bf16 and args.fp16:
        raise ConfigError(
            "bf16 and fp16 are both set, but a run computes in one of them: keep bf16, which needs no loss scaling."
        )
    on_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.fp16 and on_cpu:
        raise ConfigError(
            "fp16=True needs an accelerator, and this run is on a CPU: leave it out, or set bf16 and use_cpu."
        )
    if args.bf16 and on_cpu and not args.use_cpu:
        raise ConfigError(
            "bf16=True, but there is no accelerator: leave it out, or set use_cpu=True, to compute in bfloat16 on the CPU."
        )
    if args.tf32 and (on_cpu or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8):
        raise ConfigError("tf32=True needs an NVIDIA GPU of the Ampere generation or later: leave it out.")
    if args.bf16 and not on_cpu and torch.cuda.is_available() and not has_bfloat16():
        raise ConfigError(
            f"bf16=True, but {torch.cuda.get_device_name()} does not support bfloat16: leave it out, or set fp16."
        )


def check_packages(args: TrainingArguments) -> None:
    """Raises MissingPackageError if an option needs a package that is not installed."""
    if args.deepspeed:
        check_available("deepspeed", to=f"deepspeed={args.deepspeed!r}")
    if args.use_liger_kernel:
        check_available("liger_kernel", to="use_liger_kernel=True")
    optimizer = str(getattr(args.optim, "value", args.optim))
    for names, module in OPTIMIZERS.items():
        if re.fullmatch(names, optimizer):
            check_available(module, to=f"optim={optimizer!r}")


def check_loggers(args: TrainingArguments) -> None:
    """Raises ConfigError for a tracker that is unknown or not installed."""
    asked: Any = args.report_to
    for name in [asked] if isinstance(asked, str) else asked or []:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(f"report_to={name!r} is no tracker.{suggest(name, known)} Known: {', '.join(known)}.")
        if name not in get_available_reporting_integrations() and not (name == "flyte" and is_available("flytekit")):
            how = TRACKERS.get(name, f"pip install {name}")
            raise MissingPackageError(f"report_to={name!r} is not installed: {how}. Or leave report_to out.")
