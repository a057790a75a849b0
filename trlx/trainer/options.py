"""Translate sections of the configuration to arguments of the trainers of `trl`."""

from __future__ import annotations

import inspect
import math
import netrc
import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft import get_peft_config as peft_config_from_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler
from transformers import GenerationConfig

from trl.errors import ConfigError, suggest, unknown
from trl.imports import is_available, require
from trl.rollouts.sampling import SamplingParams
from trlx.data.configs import OptimizerConfig, SchedulerConfig, TrainConfig
from trlx.utils import logging

logger = logging.get_logger(__name__)

OPTIMIZERS = ("adam", "adamw", "adam_8bit_bnb", "adamw_8bit_bnb", "sgd")
SCHEDULERS = {"cosine_annealing": CosineAnnealingLR, "linear": LinearLR}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens", "beta")
"""Options of `gen_kwargs` that are fields of `SamplingParams`."""

WITHOUT_EFFECT = ("pad_token_id", "use_cache", "synced_gpus", "return_dict_in_generate", "output_scores")
"""Options of `gen_kwargs` that do not affect which tokens are sampled; they are ignored."""


def optimizer_class(section: OptimizerConfig) -> tuple[type, dict[str, Any]]:
    """Class of the optimizer, and its arguments without `weight_decay`. Raises ConfigError for unknown names and arguments."""
    if section.name not in OPTIMIZERS:
        raise ConfigError(unknown("optimizer.name", str(section.name), OPTIMIZERS))
    if "lr" not in section.kwargs:
        raise ConfigError("optimizer.kwargs.lr is missing: give the learning rate.")
    if texts := {name: value for name, value in section.kwargs.items() if isinstance(value, str)}:
        name, value = next(iter(texts.items()))
        raise ConfigError(f"optimizer.kwargs.{name}={value!r} is text: give a number.")
    cls = _optimizer_class(section)
    kwargs = {name: value for name, value in section.kwargs.items() if name != "weight_decay"}
    taken = inspect.signature(cls).parameters
    for name in kwargs:
        if name not in taken:
            raise ConfigError(f"optimizer.kwargs.{name} is no argument of {section.name}.{suggest(name, taken)}")
    return cls, kwargs


def _optimizer_class(section: OptimizerConfig) -> type:
    if section.name.endswith("_8bit_bnb"):
        require("bitsandbytes", to=f"optimizer.name={section.name!r}")
        import bitsandbytes

        classes = {"adam_8bit_bnb": bitsandbytes.optim.Adam8bit, "adamw_8bit_bnb": bitsandbytes.optim.AdamW8bit}
        return classes[section.name]
    classes = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    return classes[section.name]


def make_scheduler(section: SchedulerConfig, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Make the learning-rate scheduler. Raises ConfigError for unknown names and arguments."""
    if section.name not in SCHEDULERS:
        raise ConfigError(unknown("scheduler.name", str(section.name), SCHEDULERS))
    try:
        return SCHEDULERS[section.name](optimizer, **section.kwargs)
    except TypeError as error:
        raise ConfigError(f"scheduler.kwargs={section.kwargs} of {section.name}: {error}.") from error


def adapter_config(given: PeftConfig | Mapping[str, Any] | None) -> PeftConfig | None:
    """Convert a dict to an adapter configuration. Raises ConfigError if it is invalid."""
    if given is None or isinstance(given, PeftConfig):
        return given
    if not isinstance(given, Mapping) or "peft_type" not in given:
        raise ConfigError(
            f"model.peft_config={given!r}: give a configuration of peft, or a dict of one with its peft_type."
        )
    try:
        return peft_config_from_dict(dict(given))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"model.peft_config={given!r} is no configuration of peft: {error}") from error


def sampling_params(
    gen_kwargs: Mapping[str, Any], *, stop: list[str], seed: int | None = None, logit_mask: torch.Tensor | None = None
) -> SamplingParams:
    """Make sampling parameters from options of `generate`, and `beta`.

    `do_sample=False` means greedy decoding. Raises ConfigError for unknown options.
    """
    options = {name: value for name, value in gen_kwargs.items() if name not in WITHOUT_EFFECT}
    if options.pop("do_sample", True) is False:
        options["temperature"] = 0.0
    fields = {name: options.pop(name) for name in SAMPLING if options.get(name) is not None}
    if "top_k" in fields:
        fields["top_k"] = int(fields["top_k"])
    fields |= {"stop": tuple(stop), "seed": seed, "logit_mask": logit_mask}
    if (eos := options.pop("eos_token_id", None)) is not None:
        fields |= {"stop_token_ids": eos, "ignore_eos": True}
    config = GenerationConfig()
    for name in config.update(**options):
        raise ConfigError(
            f"gen_kwargs has no option {name!r}.{suggest(name, [*SAMPLING, 'do_sample', *config.to_dict()])}"
        )
    return SamplingParams(**fields, generation_config=config if options else None)


def sampling_options(gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling options that an online trainer's configuration needs; `sampling_params` returns all of them."""
    greedy = gen_kwargs.get("do_sample", True) is False
    temperature = 0.0 if greedy else first_value(gen_kwargs.get("temperature", 1.0))
    return {"max_completion_length": max_new_tokens(gen_kwargs), "temperature": temperature}


def first_value(option: Any) -> Any:
    """The first value of an option that is a list; else the value itself."""
    return option[0] if isinstance(option, list | tuple) else option


def max_new_tokens(gen_kwargs: Mapping[str, Any]) -> int:
    """Maximum number of tokens of an output; the largest one if the option is a list."""
    limit = gen_kwargs.get("max_new_tokens")
    if limit is None:
        raise ConfigError(
            "method.gen_kwargs.max_new_tokens is missing: give the maximum number of tokens of an output."
        )
    return max(limit) if isinstance(limit, list | tuple) else limit


def processes() -> int:
    """Number of processes in the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def batches_of(samples: float, section: TrainConfig) -> float:
    """Number of batches per epoch over `samples`, which are divided among the processes."""
    return samples / (section.batch_size * processes())


def steps_of_epochs(section: TrainConfig, steps_per_epoch: float) -> int:
    """Number of optimizer steps of the run: by `epochs`, at most `total_steps`."""
    return max(1, min(section.total_steps, math.ceil(section.epochs * steps_per_epoch)))


def common_arguments(train: TrainConfig, weight_decay: float) -> dict[str, Any]:
    """Arguments that the configuration of every trainer of `trl` gets."""
    micro = train.minibatch_size or train.batch_size
    if train.batch_size % micro:
        raise ConfigError(
            f"train.batch_size={train.batch_size} has to be a multiple of train.minibatch_size={train.minibatch_size}."
        )
    return {
        "output_dir": train.checkpoint_dir,
        "overwrite_output_dir": True,  # as trlX does
        "seed": train.seed,
        "save_strategy": "steps",
        "save_steps": train.checkpoint_interval,
        "save_only_model": not train.save_optimizer,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": train.batch_size // micro,
        "weight_decay": weight_decay,
        "max_grad_norm": 0.0,
        "logging_steps": min(10, train.eval_interval),
        "report_to": tracker(train),
        "run_name": train.run_name,
        "disable_tqdm": not logging.is_progress_bar_enabled(),
    }


def tracker(train: TrainConfig) -> str:
    """Name of the tracker; "none", with a warning, for wandb without a package or login. Sets its environment variables."""
    if train.tracker not in (None, "wandb", "tensorboard"):
        raise ConfigError(unknown("train.tracker", str(train.tracker), ("wandb", "tensorboard", "None")))
    if train.tracker == "wandb":
        if not _has_wandb():
            logger.warning(
                "train.tracker='wandb', but wandb is not installed, or not logged in: nothing is sent to it."
            )
            return "none"
        names = {"PROJECT": train.project_name, "ENTITY": train.entity_name, "RUN_GROUP": train.group_name}
        names |= {"TAGS": ",".join(train.tags) or None, "DIR": train.logging_dir}
        os.environ.update({f"WANDB_{name}": value for name, value in names.items() if value})
    if train.tracker == "tensorboard":
        if not is_available("tensorboard"):
            raise ConfigError(
                "train.tracker='tensorboard', which is not installed: pip install tensorboard, or set None."
            )
        if train.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = train.logging_dir
    return train.tracker or "none"


def _has_wandb() -> bool:
    if not is_available("wandb"):
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc().hosts
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
