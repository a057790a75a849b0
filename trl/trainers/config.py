"""The options that all trainers share."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, wraps
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import transformers
from transformers import TrainingArguments

from trl.compat.options import OPTIONS, advice_on, asks_for_nothing
from trl.errors import ConfigError
from trl.noise import say_once
from trl.ops.products import has_bfloat16
from trl.option_bounds import check_bounds
from trl.option_names import OptionNames, Options
from trl.option_types import check_choices, describe_fields, make_plain, settable
from trl.trainers.mapping_options import check_entries, check_mappings
from trl.trainers.option_checks import (
    check_best,
    check_intervals,
    check_loggers,
    check_packages,
    check_precision,
    leave_mps,
)
from trl.trainers.option_effects import ignore, warn_of_options
from trl.training.parallel import check_processes, processes_on_cpu, read_on_every_process, tell_exits_shortly

ALIASES = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "use_mps_device": "",
    "group_by_length": "",
    "save_safetensors": "",
    "include_tokens_per_second": "",
    "dataset_batch_size": "",
    "num_of_sequences": "",
    "chars_per_token": "",
    "infinite": "",
    "use_liger": "use_liger_kernel",
    "use_liger_loss": "",
}
"""Older names of options → today's. Empty: the option is accepted and ignored, since its effect is now the default."""


OLD_NAME, NEW_NAME = "gradient_checkpointing", "activation_checkpointing"
RENAMED_CHECKPOINTING = NEW_NAME in TrainingArguments.__dataclass_fields__
"""Recent `transformers` call gradient checkpointing activation checkpointing, and warn about the old name."""
OTHER_NAMES = {
    f"{old}{end}": f"{new}{end}" for old, new in permutations((OLD_NAME, NEW_NAME)) for end in ("", "_kwargs")
}
"""Each option of gradient checkpointing → the same option by its other name."""


TEMPLATES = (".jinja", ".j2")
"""File extensions of chat templates."""


def is_own(cls: type) -> bool:
    """Whether a class of configurations is one of this package, not one that a script derives from it."""
    return cls.__module__.startswith("trl.")


def _remembering(post_init: Callable[..., None]) -> Callable[..., None]:
    """A `__post_init__` that remembers the options as they were given, and what was made of them: see `trl.trainers.options`."""

    @wraps(post_init)
    def remembering(config: TrainerConfig, *init_vars: Any) -> None:
        own = vars(config)
        is_outermost = "_given" not in own or "_made" in own
        if is_outermost:
            own.pop("_made", None)
            names = _init_vars_of(config.package_class())
            own["_given"] = config.options_now() | dict(zip(names, init_vars, strict=True))
        post_init(config, *init_vars)
        if is_outermost:
            own["_made"] = _copied(own)

    return remembering


@cache
def _names_of(cls: type) -> tuple[str, ...]:
    """The names of the options that the constructor of a configuration takes."""
    return tuple(field.name for field in settable(cls) if field.init)


@cache
def _init_vars_of(cls: type) -> tuple[str, ...]:
    """The names of the options that `__post_init__` gets as arguments."""
    stored = {field.name for field in fields(cls)}
    return tuple(field.name for field in settable(cls) if field.name not in stored)


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a dict and of the dicts and lists in it, which a script may change in place."""
    return {name: copy.copy(value) if isinstance(value, dict | list) else value for name, value in values.items()}


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal; False for those that compare entry by entry, as tensors do."""
    return value is other or (value == other) is True


class _ConfigMeta(OptionNames):
    """Accepts older names of options, and documents a configuration by the docstrings of its fields."""

    if not TYPE_CHECKING:

        def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> None:
            super().__init__(name, bases, namespace, **kwargs)
            if is_own(cls) and "__post_init__" in namespace:
                cls.__post_init__ = _remembering(namespace["__post_init__"])

        @property
        def __doc__(cls) -> str:
            """The docstring of the class, followed by its fields with theirs."""
            words = cls.__dict__.get("__doc__") or f"{cls.__name__}."
            # `dataclass` reads `__doc__` while it builds the class, when the fields are not known yet.
            return f"{words}\n\n{describe_fields(cls)}" if "__match_args__" in cls.__dict__ else words

        @__doc__.setter
        def __doc__(cls, words: str) -> None:
            type.__dict__["__doc__"].__set__(cls, words)


def liger_layers(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """`liger_kernel_config` with Liger's cross-entropy losses off, since trl computes the loss with its own kernels.

    Raises ConfigError if one of these losses is switched on.
    """
    given = dict(json.loads(given) if isinstance(given, str) else given or {})
    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        if given.get(name):
            raise ConfigError(
                f"liger_kernel_config={{{name!r}: True}}: trl computes the loss with its own fused kernels, which never "
                "store the logits of all tokens. Leave this entry out; Liger's layers are used."
            )
        given[name] = False
    return given


@dataclass
class TrainerConfig(TrainingArguments, Options, metaclass=_ConfigMeta):
    """Options that all trainers share, on top of `transformers.TrainingArguments`."""

    ALIASES: ClassVar[dict[str, str]] = ALIASES
    EXCLUSIVE: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Options that stand for each other: one that is set later takes the place of the others."""
    smooths_labels: ClassVar[bool] = False
    """Whether the trainer's loss reads `label_smoothing_factor`."""

    output_dir: str | None = None
    """Folder for the model, its checkpoints and the report. None: `trainer_output`."""

    max_steps: int = -1
    """Number of optimizer steps, in place of `num_train_epochs`; needed for streamed rows. −1: as many as the epochs have."""

    gradient_accumulation_steps: int = 1
    """Number of batches of `per_device_train_batch_size` rows that each device contributes to an optimizer step."""

    save_steps: float = 500
    """Write a checkpoint every so many optimizer steps; a number below 1 is a fraction of all steps. 0: at the end alone."""

    learning_rate: float = 2e-5
    """Peak learning rate, which is reached at the end of warm-up."""

    logging_steps: float = 10
    """Log every so many optimizer steps; a number below 1 is a fraction of all steps."""

    bf16: bool | None = None
    """Compute in bfloat16 by autocast; weights keep their dtype. None: if the GPU supports bfloat16; never on a CPU."""

    gradient_checkpointing: bool | None = None
    """Recompute activations in backward instead of storing them. None: off on a CPU, on with an accelerator; with CUDA,
    language models are checkpointed in only as many layers as the free memory requires, and the number is logged."""

    logging_dir: str | None = None
    """Folder of TensorBoard's logs. None: `runs` in the output folder."""

    overwrite_output_dir: bool = False
    """Remove the checkpoints and the model that an earlier run left in the output folder, unless this run resumes from
    them. Without it, a folder of another run (with another method, model, rows or options) raises an error."""

    model_init_kwargs: dict[str, Any] | str | None = None
    """Keyword arguments of `from_pretrained`, when the model is given by name (dtype, attn_implementation, …)."""

    trust_remote_code: bool = False
    """Allow code that comes with a model or tokenizer to run."""

    chat_template_path: str | None = None
    """Take the chat template from this tokenizer, or from a `.jinja` file."""

    pad_token: str | None = None
    """Set the tokenizer's padding token. Training works without one."""

    eos_token: str | None = None
    """Set the tokenizer's end-of-sequence token."""

    dataset_num_proc: int | None = None
    """Number of processes that encode the dataset."""

    layout: Literal["padded", "packed", "shared", "auto"] = "auto"
    """How the sequences of a micro-batch are arranged: one per row ("padded"), concatenated in rows ("packed"), packed with
    each prompt stored once for all its completions ("shared"), or "auto", the fastest layout that the model supports."""

    max_tokens_per_micro_batch: int | None = None
    """Split each accumulation window into micro-batches of at most so many tokens. None: no limit with an accelerator;
    2,048 on a CPU, where larger micro-batches are not faster."""

    pad_to_multiple_of: int | str | None = "auto"
    """Pad the width of micro-batches to a multiple of this. "auto": 8 on an accelerator, 1 on a CPU."""

    max_pixels: int | None = None
    """Most pixels (width · height) of an image; larger images are scaled down, with the same aspect ratio."""

    min_pixels: int | None = None
    """Fewest pixels of an image; smaller images are scaled up."""

    image_folder: str | None = None
    """Folder that relative paths of images start from."""

    image_features_mb: int = 1024
    """Host memory in MiB for a cache of image features. While the image encoder and its projector are frozen, each image is
    encoded once for policy, reference, sampling and all epochs; the least recently used features are evicted. 0: no cache."""

    adapted_part: Literal["language", "language_and_projector", "everything"] = "language"
    """Which part of a vision-language model a new adapter (`peft_config`) is put on; the rest stays frozen."""

    shuffle_dataset: bool = False
    """Shuffle the training rows once before encoding (streaming: with a buffer)."""

    max_skipped_steps: int | None = 3
    """Stop the run at so many skipped steps in a row. A step whose loss or gradient is not finite is skipped and counted:
    weights and optimizer do not change, while data and learning rate move on. None: never stop."""

    logging_nan_inf_filter: bool = False
    """Not needed: steps whose loss is not finite are skipped, and the logged loss leaves them out."""

    disable_dropout: bool = False
    """Set every dropout probability of the model to zero."""

    ddp_find_unused_parameters: bool | None = False
    """With DDP, look for parameters that get no gradient in a step; costs time in every step."""

    html_report: bool = True
    """Write `report.html`, a page with the run's curves and options, to the output folder."""

    activation_offloading: bool = False
    """Keep the inputs of checkpointed layers in host memory until backward needs them; implies `gradient_checkpointing`,
    and takes time for the copies."""

    cuda_graphs: bool | None = None
    """Run the layers' forward and backward as CUDA graphs for micro-batches so small that the GPU waits for the CPU.
    Gradients stay allocated between steps. None: yes on CUDA; trainers that sample also need enough free memory."""

    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts. None: that of the model's configuration, if it sets
    `output_router_logits`. Takes an extra forward pass if a step has several micro-batches or processes."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        say_once()
        self.debug = [] if self.debug is None else self.debug  # `HfArgumentParser` leaves None
        self.check_values()
        leave_mps(self)
        check_precision(self)
        check_packages(self)
        check_loggers(self)
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(self.logging_dir).expanduser())
        self.report_to = "none" if self.report_to is None else self.report_to
        self.refuse("include_for_metrics")
        ignore(self, "average_tokens_across_devices", True, "losses are averaged over the tokens of all processes.")
        if self.enable_jit_checkpoint:
            raise ConfigError(
                "enable_jit_checkpoint=True would write a checkpoint in the middle of a step, from which a run does not resume "
                "exactly: leave it out, and train within trl.exit_on_signal(trainer), as the command line does."
            )
        if self.label_smoothing_factor and not self.smooths_labels:
            has_own = "label_smoothing" in self.__dataclass_fields__
            advice = "leave it out" + (", or set label_smoothing, which is for this loss." if has_own else ".")
            raise ConfigError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect on this loss: {advice}"
            )
        if self.use_liger_kernel:
            self.liger_kernel_config = liger_layers(self.liger_kernel_config)
        accelerated = not self.use_cpu and torch.accelerator.is_available()
        if self.activation_offloading:
            self.offload_activations(accelerated=accelerated)
        if self.bf16 is None:
            self.bf16 = accelerated and not self.fp16 and torch.cuda.is_available() and has_bfloat16()
        is_open = all(getattr(self, name, None) is None for name in OTHER_NAMES)
        plans = accelerated and torch.cuda.is_available() and is_open
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = accelerated
        if RENAMED_CHECKPOINTING and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
            if self.activation_checkpointing_kwargs is None:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if not accelerated:
            self.dataloader_pin_memory = False
        with processes_on_cpu(self):
            super().__post_init__()
            check_processes(self)
        check_entries(self)
        read_on_every_process(self)
        tell_exits_shortly(self)
        self.plans_checkpointing = plans

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option of gradient checkpointing under both its names; set after construction, it also ends the planning.

        Raises ConfigError for options of other releases that a script would set in vain.
        """
        cls = type(self)
        is_known = name in cls.ALIASES or hasattr(cls, name)
        if name in OPTIONS and not is_known and not asks_for_nothing(name, value):
            raise ConfigError(f"{cls.__name__} has no option {name!r}.{advice_on(name)}")
        super().__setattr__(name, value)
        if name in OTHER_NAMES and "plans_checkpointing" in vars(self):
            self.plans_checkpointing = False
            if OTHER_NAMES[name] in self.__dataclass_fields__:
                super().__setattr__(OTHER_NAMES[name], value)

    @classmethod
    def package_class(cls) -> type[TrainerConfig]:
        """The class itself, or the class of this package that a script derived it from."""
        return next(base for base in cls.__mro__ if issubclass(base, TrainerConfig) and is_own(base))

    def options_now(self) -> dict[str, Any]:
        """The values of all options that this package has."""
        return _copied({name: getattr(self, name) for name in _names_of(self.package_class())})

    def changed(self) -> dict[str, Any]:
        """The options that were set after the configuration was made, except by the planner of gradient checkpointing.

        Those that the `__init__` and `__post_init__` of a script's class set last are among them.
        """
        made, planned = vars(self).get("_made", vars(self)), OTHER_NAMES if self.plans_checkpointing else ()
        names = [name for name in _names_of(self.package_class()) if name not in planned]
        now = {name: getattr(self, name) for name in names}
        return {name: value for name, value in now.items() if name in made and not is_same(value, made[name])}

    def check_values(self) -> None:
        """Raises ConfigError for values that are invalid or out of range, and for files that do not exist.

        Warns of options without effect.
        """
        make_plain(self)
        check_choices(self)
        check_mappings(self)
        check_intervals(self)
        check_best(self)
        check_bounds(self)
        warn_of_options(self)
        template = self.chat_template_path or ""
        if template.endswith(TEMPLATES) and not Path(template).expanduser().is_file():
            raise ConfigError(f"chat_template_path={template!r}: there is no such file.")

    def to_dict(self) -> dict[str, Any]:
        """As in `transformers`, which masks all names that end in `_token`; only that of the hub is a secret."""
        plain = {"pad_token": self.pad_token, "eos_token": self.eos_token}
        return super().to_dict() | plain | ({"hub_token": None} if self.hub_token is None else {})

    def loading(self, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`kwargs` for `from_pretrained`, with `trust_remote_code` added."""
        return {"trust_remote_code": self.trust_remote_code, **(kwargs or {})}

    def offload_activations(self, *, accelerated: bool) -> None:
        """Set the options of `transformers` that offload activations.

        Raises ConfigError without an accelerator or gradient checkpointing, or if `transformers` is too old.
        """
        if not accelerated:
            raise ConfigError(
                "activation_offloading=True needs an accelerator: on a CPU, activations are in host memory already. "
                "Leave it out."
            )
        if self.gradient_checkpointing is False:
            raise ConfigError(
                "activation_offloading=True keeps the inputs of checkpointed layers in host memory, but "
                "gradient_checkpointing=False checkpoints none: leave one of them out."
            )
        if not offloads_activations():
            raise ConfigError(
                f"activation_offloading=True needs transformers 5.17 or later, and this is {transformers.__version__}."
            )
        self.gradient_checkpointing = True
        given = self.gradient_checkpointing_kwargs or {}
        self.gradient_checkpointing_kwargs = {
            **(json.loads(given) if isinstance(given, str) else given),
            "offload": True,
        }

    def refuse(self, *names: str) -> None:
        """Raises ConfigError if one of the options `names`, which are accepted but not implemented, is set."""
        for name in names:
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not available in this version: leave it out.")

    def recompute(self, *, activations: bool) -> None:
        """Set `gradient_checkpointing` to what the planner decided; `plans_checkpointing` stays as it is."""
        plans = self.plans_checkpointing
        self.gradient_checkpointing = activations
        self.plans_checkpointing = plans

    def set_checkpointing(self, **options: Any) -> None:
        """Set options of `torch.utils.checkpoint`, unless the user gave them."""
        plans = self.plans_checkpointing
        given = getattr(self, f"{NEW_NAME}_kwargs", None) or self.gradient_checkpointing_kwargs or {}
        self.gradient_checkpointing_kwargs = {**options, **given}
        self.plans_checkpointing = plans

    @property
    def width_multiple(self) -> int:
        """`pad_to_multiple_of` as a number."""
        if self.pad_to_multiple_of == "auto":
            return 1 if self.device.type == "cpu" else 8
        return int(self.pad_to_multiple_of or 1)


def offloads_activations() -> bool:
    """Whether the installed `transformers` can offload checkpointed activations to host memory."""
    name = "activation_checkpointing_enable" if RENAMED_CHECKPOINTING else "gradient_checkpointing_enable"
    return "offload" in inspect.signature(getattr(transformers.PreTrainedModel, name)).parameters


@dataclass
class ReferenceConfig(TrainerConfig):
    """Options of trainers that compare the policy with a reference model."""

    learning_rate: float = 1e-6

    max_prompt_length: int | None = None
    """Most tokens of a prompt; longer ones lose their beginning. None: no limit for prompts alone."""

    sync_ref_model: bool = False
    """Move the reference towards the policy during training (TR-DPO, arXiv:2404.09656)."""

    ref_model_mixup_alpha: float = 0.6
    """Weight α of the policy in the updated reference, α π + (1 − α) π_ref; 1 copies the policy."""

    ref_model_sync_steps: int = 512
    """Optimizer steps between two updates of the reference."""
