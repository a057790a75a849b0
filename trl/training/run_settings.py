"""The settings of a run, saved in its checkpoints, and compared when it is resumed.

Differences that would make the resumed run wrong are errors: another trainer, another optimizer, other trained parameters.
Differences that may be intended are warnings: other rows, other options. A warning also names changed options that have
no effect, because the checkpoint's optimizer state contains them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from trl.errors import ConfigError, listed
from trl.models.load import DTYPE
from trl.models.score import unwrap

logger = logging.getLogger(__name__)

SETTINGS_FILE = "trl_run.json"
ROWS = 64
"""Number of rows, evenly spread over a dataset, from which its hash is computed."""
SHOWN = 4

WRONG = ("trainer", "optim")
"""Settings that must not change: the state of another trainer or optimizer would be misread."""
OVERRULED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Options that are restored with the optimizer's state, so that a changed value has no effect."""
NOT_LEARNED_FROM = """
    output_dir logging_ save_ eval_ report_to run_name push_to_hub hub_ dataloader_ ddp_ disable_tqdm resume_from_checkpoint
    use_cpu log_ project trackio html_report local_rank fsdp deepspeed accelerator_config do_ per_device_eval load_best
    metric_for_best greater_is_better gradient_checkpointing activation_ restore_callback overwrite debug
    num_completions_to_print max_skipped_steps ignore_data_skip
"""
"""Prefixes of the names of options that do not change what is learned."""


def describe_run(trainer: Any) -> dict[str, Any]:
    """The settings of a run, as saved in its checkpoints."""
    return {
        "trainer": type(trainer).__name__,
        "model": name_of(unwrap(trainer.model)),
        "adapter": next((vars(m)["_trl_source"] for m in trainer.model.modules() if "_trl_source" in vars(m)), ""),
        "optim": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "parameters": trained_parameters(unwrap(trainer.model)),
        "rows": describe_rows(trainer.train_dataset),
        "options": dict(_options(trainer.args.to_dict())),
    }


CHANGED_LATER = ("model_init_kwargs", "max_grad_norm")
"""Options that trainers change in their constructor."""


def describe_options(trainer: str, model: str, args: Any) -> dict[str, Any]:
    """The part of `describe_run` that is known before model and rows are loaded.

    `trainer` is the name of its class, `model` that of a full model; empty if the name is that of an adapter.
    """
    options = {name: value for name, value in _options(args.to_dict()) if name not in CHANGED_LATER}
    optim = str(getattr(args.optim, "value", args.optim))
    return {"trainer": trainer, "optim": optim, "options": options} | ({"model": model} if model else {})


def name_of(model: nn.Module) -> str:
    """The name or folder that a model was loaded from; empty for one that was created from a configuration."""
    config = vars(model).get("config") or vars(model).get("_internal_dict") or {}
    return dict(config if isinstance(config, Mapping) else vars(config)).get("_name_or_path") or ""


def _options(options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    unlearned = tuple(NOT_LEARNED_FROM.split())
    for name, value in options.items():
        if not name.startswith(unlearned) and name not in WRONG:
            loading = name == "model_init_kwargs"
            yield name, json.loads(json.dumps(_with_precision(value or {}) if loading else value, default=str))


def _with_precision(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `load_model` with its default precision, which commands write out and scripts mostly leave out."""
    others = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
    given = kwargs.get("dtype") or kwargs.get("torch_dtype") or DTYPE
    return {**others, "dtype": str(given).removeprefix("torch.")}


def trained_parameters(model: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of the parameters that are trained."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace("_orig_mod.", ""): list(getattr(p, "ds_shape", p.shape)) for name, p in trained}


def describe_rows(rows: Any) -> dict[str, Any]:
    """The number of rows, and a hash of some of them; empty for a streamed dataset, which cannot be read in advance."""
    if not isinstance(rows, Dataset):
        return {}
    count = len(rows)
    chosen = sorted({i * (count - 1) // (ROWS - 1) for i in range(ROWS)}) if count else []
    digest = xxhash.xxh3_128()
    for i in chosen:
        digest.update(repr(sorted(rows[i].items())).encode(errors="replace"))
    return {"count": count, "hash": digest.hexdigest()}


def check_rows_alike(described: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError if processes have different rows: some would be trained on twice, others never.

    `described` are the results of `describe_rows` on all processes.
    """
    rank = next((rank for rank, rows in enumerate(described) if rows != described[0]), None)
    if rank is not None:
        there, here = (rows.get("count", "a stream of") for rows in (described[0], described[rank]))
        raise ConfigError(
            f"train_dataset is not the same in all processes ({there} rows in process 0, {here} in process {rank}, or others): give "
            "every process all rows, in one order (shuffle with a seed); each takes its share of them."
        )


def check_settings(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Compare the settings of a run with those of a checkpoint.

    Raises ConfigError if resuming would give a wrong result; other differences are logged as warnings.
    """
    file = checkpoint / SETTINGS_FILE
    if not file.exists():  # a checkpoint of another library
        return
    then = json.loads(file.read_text(encoding="utf-8"))
    for name in WRONG:
        if then[name] != now[name]:
            raise ConfigError(
                f"Training cannot be resumed from {str(checkpoint)!r}: {name} was {then[name]!r}, and is {now[name]!r} now. "
                "Use the former setting, or start a new run from its weights: give the folder as the model."
            )
    check_parameters(checkpoint, then["parameters"], now["parameters"])
    for warning in differences(then, now):
        logger.warning(f"Resuming from {checkpoint}: {warning}")


def check_parameters(checkpoint: Path, then: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> None:
    """Raise ConfigError if other parameters are trained, or some have another shape (such as the rank of an adapter)."""
    missing, added = [n for n in then if n not in now], [n for n in now if n not in then]
    reshaped = [f"{n} ({list(then[n])} → {list(now[n])})" for n in then if n in now and list(then[n]) != list(now[n])]
    said = [
        f"{what}: {listed(names, SHOWN)}"
        for what, names in (
            ("only in the checkpoint", missing),
            ("not in the checkpoint", added),
            ("of another shape", reshaped),
        )
        if names
    ]
    if said:
        raise ConfigError(
            f"Training cannot be resumed from {str(checkpoint)!r}: other parameters are trained ({'; '.join(said)}). Use the "
            "same model, target_modules and rank of the adapter as in that run."
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Warnings of changed rows and options, and of options whose change has no effect."""
    before, after = then["options"], now["options"]
    changed = [name for name in after if name in before and before[name] != after[name]]
    said = []
    if then["rows"] and now["rows"] and then["rows"] != now["rows"]:
        count = f"{then['rows']['count']:,} rows then, {now['rows']['count']:,} now"
        said.append(
            f"train_dataset is not the one that the run started with ({count}): it is read from the same position on."
        )
    for name in changed:
        was = f"{name} was {before[name]!r}, and is {after[name]!r} now"
        if name in OVERRULED:
            said.append(
                f"{was}, which has no effect: the optimizer keeps the former value. Start a new run to change it."
            )
        else:
            said.append(f"{was}.")
    return said


def check_adapter(checkpoint: Path, model: nn.Module) -> None:
    """Raise ConfigError if the names or shapes of a checkpoint's adapter differ from those of the adapter in training.

    Missing weights would silently keep their initial values, and additional ones would silently be dropped.
    """
    files = list(checkpoint.glob("adapter_model.safetensors"))
    inner = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if not files or inner is None:
        return
    with safe_open(files[0], "pt") as opened:
        held = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    active = inner.active_adapter
    wanted = {
        name.replace(f".{active}", ""): list(getattr(p, "ds_shape", p.shape))
        for name, p in inner.named_parameters()
        if f".{active}" in name and p.requires_grad
    }
    check_parameters(checkpoint, held, {n: s for n, s in wanted.items() if n in held or ".lora_" in n})
