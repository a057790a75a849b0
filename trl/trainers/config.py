"""What every trainer's configuration shares."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import transformers
from transformers import TrainingArguments

from trl.errors import ConfigError
from trl.noise import say_once
from trl.option_bounds import check_bounds
from trl.option_names import OptionNames
from trl.option_types import check_choices, describe_fields
from trl.trainers.option_checks import check_best, check_deepspeed, check_intervals, check_loggers, check_precision
from trl.trainers.option_effects import warn_of_options
from trl.training.parallel import check_processes, processes_on_cpu

ALIASES = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "group_by_length": "",
    "save_safetensors": "",
    "include_tokens_per_second": "",
    "dataset_batch_size": "",
    "num_of_sequences": "",
    "chars_per_token": "",
    "infinite": "",
    "use_liger": "use_liger_kernel",
}
"""Names that older scripts use, and today's. Empty: what it asked for always happens now, or is no longer needed."""


OLD_NAME, NEW_NAME = "gradient_checkpointing", "activation_checkpointing"
RENAMED_CHECKPOINTING = NEW_NAME in TrainingArguments.__dataclass_fields__
"""Recent `transformers` call gradient checkpointing activation checkpointing, and warn about the old name."""
OTHER_NAMES = {
    f"{old}{end}": f"{new}{end}" for old, new in permutations((OLD_NAME, NEW_NAME)) for end in ("", "_kwargs")
}
"""The other name of each option of checkpointing."""


TEMPLATES = (".jinja", ".j2")
"""Endings of files with a chat template."""


class _ConfigMeta(OptionNames):
    """The names of options, and documentation made of what stands under them."""

    if not TYPE_CHECKING:

        @property
        def __doc__(cls) -> str:
            """The class's own words, and every field with what it is."""
            words = cls.__dict__.get("__doc__") or ""
            # `dataclass` asks while it makes the class: nothing is read from source then.
            return f"{words}\n\n{describe_fields(cls)}" if "__match_args__" in cls.__dict__ else words


def liger_layers(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Options of Liger that replace layers and leave the head, which scores tokens itself, as it is.

    Raises ConfigError where one of its losses is asked for.
    """
    given = dict(json.loads(given) if isinstance(given, str) else given or {})
    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        if given.get(name):
            raise ConfigError(
                f"liger_kernel_config={{{name!r}: True}}: the head is scored by kernels of its own here, and logits of all "
                "tokens never exist. Leave it out; Liger's layers are used."
            )
        given[name] = False
    return given


@dataclass
class TrainerConfig(TrainingArguments, metaclass=_ConfigMeta):
    """Options that all trainers share, on top of `transformers.TrainingArguments`."""

    ALIASES: ClassVar[dict[str, str]] = ALIASES
    smooths_labels: ClassVar[bool] = False
    """Whether `label_smoothing_factor` has an effect."""

    learning_rate: float = 2e-5
    """Learning rate after warm-up, where its schedule starts."""

    logging_steps: float = 10
    """Log every so many optimizer steps; a number below 1 is a share of all steps."""

    bf16: bool | None = None
    """Compute in bfloat16 (weights stay as loaded). None: where the device supports it well; never on a CPU."""

    gradient_checkpointing: bool | None = None
    """Compute activations again in backward instead of keeping them. None: on with an accelerator, and with
    CUDA in as few layers of a language model as the memory that is free asks for, which is logged; off on a CPU."""

    logging_dir: str | None = None
    """Folder of TensorBoard's logs. None: `runs` in the output folder."""

    overwrite_output_dir: bool = False
    """Remove the checkpoints and the model that an earlier run left in the output folder, unless this one resumes from
    them. Without it, a folder that holds another run (method, model, rows, options) is refused."""

    model_init_kwargs: dict[str, Any] | str | None = None
    """Keyword arguments of `from_pretrained`, when the model is given by name (dtype, attn_implementation, …)."""

    trust_remote_code: bool = False
    """Allow code that comes with a model or tokenizer to run."""

    chat_template_path: str | None = None
    """Take the chat template from this tokenizer, or from a `.jinja` file."""

    pad_token: str | None = None
    """Set the tokenizer's padding token. Training itself needs none."""

    eos_token: str | None = None
    """Set the tokenizer's end-of-sequence token."""

    dataset_num_proc: int | None = None
    """Processes that encode the dataset."""

    layout: Literal["padded", "packed", "shared", "auto"] = "auto"
    """How sequences lie in a forward pass: "padded", "packed", "shared", or "auto", the fastest that the model can."""

    max_tokens_per_micro_batch: int | None = None
    """Split an accumulation window into as many forward passes as keep each under so many tokens. None: no limit with
    an accelerator; 2,048 on a CPU, where wide passes are not faster."""

    pad_to_multiple_of: int | str | None = "auto"
    """Widths of a forward pass are multiples of this. "auto": of 8 on an accelerator."""

    max_pixels: int | None = None
    """Most pixels (width · height) of an image; a larger one is made smaller, its sides in the same proportion."""

    min_pixels: int | None = None
    """Fewest pixels of an image; a smaller one is made larger."""

    image_folder: str | None = None
    """Folder that relative paths of images start from."""

    image_features_mb: int = 1024
    """Main memory in MiB for features of images. While the image encoder and its projector are frozen, an image is encoded
    once for policy, reference, sampling and all epochs; those used longest ago are encoded again where there is no room.
    0: encode in every forward pass."""

    adapted_part: Literal["language", "language_and_projector", "everything"] = "language"
    """Which part of a model that reads images a new adapter (`peft_config`) is put on; the rest stays frozen."""

    shuffle_dataset: bool = False
    """Shuffle the training rows once before encoding (streaming: with a buffer)."""

    max_skipped_steps: int | None = 3
    """Skipped steps in a row that end the run. A step is skipped, and counted, if its loss or gradient is not finite:
    weights and optimizer stay as they are, while data and learning rate go on. None: never."""

    logging_nan_inf_filter: bool = False
    """Not needed: steps whose loss is not finite are skipped, and not part of the loss that is logged."""

    disable_dropout: bool = False
    """Set every dropout probability of the model to zero."""

    ddp_find_unused_parameters: bool | None = False
    """Look for parameters that the loss of a step does not depend on, with DDP; costs time in every step."""

    html_report: bool = True
    """Write a page of the run, with its curves and options, to `report.html` in the output folder at the end."""

    activation_offloading: bool = False
    """Keep what checkpointed layers start from in the host's memory, until backward asks for it; implies
    `gradient_checkpointing`. Costs the time of the copies."""

    cuda_graphs: bool | None = None
    """Launch forward and backward of the layers as CUDA graphs, where micro-batches are so small that the device waits for
    the host. Gradients keep their memory between steps. None: on CUDA; in trainers that sample, where memory for both is free."""

    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts. None: as the model's configuration says, which asks for
    it by `output_router_logits`. Takes one more pass where a step has several micro-batches or processes."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        say_once()
        self.debug = [] if self.debug is None else self.debug  # as parsers of `transformers` leave it
        self.check_values()
        check_precision(self)
        check_deepspeed(self)
        check_loggers(self)
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(self.logging_dir).expanduser())
        self.refuse("include_for_metrics")
        if self.label_smoothing_factor and not self.smooths_labels:
            near = "label_smoothing" if "label_smoothing" in self.__dataclass_fields__ else "nothing here"
            raise ConfigError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect on this loss: leave it out ({near} does "
                "something alike)."
            )
        if self.use_liger_kernel:
            self.liger_kernel_config = liger_layers(self.liger_kernel_config)
        accelerated = not self.use_cpu and torch.accelerator.is_available()
        if self.activation_offloading:
            self.offload_activations(accelerated=accelerated)
        if self.bf16 is None:
            self.bf16 = accelerated and not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        is_open = all(getattr(self, name, None) is None for name in OTHER_NAMES)
        plans = accelerated and torch.cuda.is_available() and is_open
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = accelerated
        if RENAMED_CHECKPOINTING and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
            if self.activation_checkpointing_kwargs is None:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if self.accelerator_config is None:
            self.accelerator_config = {"dispatch_batches": False}
        if not accelerated:
            self.dataloader_pin_memory = False
        with processes_on_cpu(self):
            super().__post_init__()
            check_processes(self)
        self.plans_checkpointing = plans

    def __setattr__(self, name: str, value: Any) -> None:
        """Options of checkpointing that are set later are set under both of their names, and nothing is planned then."""
        super().__setattr__(name, value)
        if name in OTHER_NAMES and "plans_checkpointing" in vars(self):
            self.plans_checkpointing = False
            if OTHER_NAMES[name] in self.__dataclass_fields__:
                super().__setattr__(OTHER_NAMES[name], value)

    def check_values(self) -> None:
        """Raises ConfigError for a value that is none of an option's choices, or too small, or a file that is not there.

        Says which options have no effect.
        """
        check_choices(self)
        check_intervals(self)
        check_best(self)
        check_bounds(self)
        warn_of_options(self)
        template = self.chat_template_path or ""
        if template.endswith(TEMPLATES) and not Path(template).expanduser().is_file():
            raise ConfigError(f"chat_template_path={template!r}: there is no such file.")

    def loading(self, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`: those given, and whether the code of a model is trusted."""
        return {"trust_remote_code": self.trust_remote_code, **(kwargs or {})}

    def offload_activations(self, *, accelerated: bool) -> None:
        """Ask `transformers` for it. Raises ConfigError without an accelerator, without checkpointing, and in older releases."""
        if not accelerated:
            raise ConfigError(
                "activation_offloading=True: activations are in the host's memory already where nothing else computes. "
                "Leave it out."
            )
        if self.gradient_checkpointing is False:
            raise ConfigError(
                "activation_offloading=True keeps what checkpointed layers start from in the host's memory, and "
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
        """Raises ConfigError for options that other releases have, if one of them is asked for."""
        for name in names:
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not available in this version: leave it out.")

    def recompute(self, *, activations: bool) -> None:
        """Settle `gradient_checkpointing`, as a plan has it."""
        plans = self.plans_checkpointing
        self.gradient_checkpointing = activations
        self.plans_checkpointing = plans

    def set_checkpointing(self, **options: Any) -> None:
        """Options of `torch.utils.checkpoint`, where none was given by these names."""
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
    """Whether this release of `transformers` can keep checkpoints of activations in the host's memory."""
    name = "activation_checkpointing_enable" if RENAMED_CHECKPOINTING else "gradient_checkpointing_enable"
    return "offload" in inspect.signature(getattr(transformers.PreTrainedModel, name)).parameters


@dataclass
class ReferenceConfig(TrainerConfig):
    """Options that the trainers share which hold the policy near a reference."""

    learning_rate: float = 1e-6

    max_prompt_length: int | None = None
    """Tokens of a prompt; the beginning of a longer one is cut. None: no limit of its own."""

    sync_ref_model: bool = False
    """Move the reference towards the policy while training (TR-DPO, arXiv:2404.09656)."""

    ref_model_mixup_alpha: float = 0.6
    """Share α of the policy in the new reference, α π + (1 − α) π_ref; 1 replaces it."""

    ref_model_sync_steps: int = 512
    """Optimizer steps between two moves of the reference."""
