"""Options of classic DDPO and AlignProp, by the names and defaults of TRL 0.4 to 0.11."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from trl.errors import ConfigError
from trl.imports import check_available
from trl.option_bounds import check_bounds
from trl.option_names import Options

SCRIPT = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""


@dataclass
class ClassicConfig(Options):
    """Options shared by `DDPOConfig` and `AlignPropConfig`."""

    exp_name: str = SCRIPT
    """Name of the experiment."""

    run_name: str = ""
    """Name of the run."""

    seed: int = 0
    """Seed of prompts, noise and weights."""

    log_with: Literal["wandb", "tensorboard"] | None = None
    """Tracker that statistics and pictures go to."""

    tracker_kwargs: dict = field(default_factory=dict)
    """Keyword arguments of the tracker."""

    accelerator_kwargs: dict = field(default_factory=dict)
    """Not available: the accelerator is set up by the other options, and by how the script was launched."""

    project_kwargs: dict = field(default_factory=dict)
    """Options of `accelerate`; only `project_dir` (instead of logdir), `logging_dir` and `total_limit` (instead of
    num_checkpoint_limit) are read."""

    tracker_project_name: str = "trl"
    """Project in the tracker."""

    logdir: str = "logs"
    """Folder of checkpoints."""

    num_epochs: int = 100
    """Number of epochs; each samples pictures and trains on them."""

    save_freq: int = 1
    """Write a checkpoint every so many epochs."""

    num_checkpoint_limit: int = 5
    """Number of checkpoints to keep."""

    mixed_precision: str = "fp16"
    """"fp16", "bf16" or "no". Without an accelerator it is "no"."""

    allow_tf32: bool = True
    """Compute float32 matrix products in TF32, on NVIDIA GPUs."""

    resume_from: str = ""
    """Checkpoint to resume from, or a folder of checkpoints, of which the newest is taken."""

    sample_num_steps: int = 50
    """Number of denoising steps."""

    sample_eta: float = 1.0
    """η of DDIM, the noise of its steps."""

    sample_guidance_scale: float = 5.0
    """Scale of classifier-free guidance."""

    train_use_8bit_adam: bool = False
    """Use the 8-bit AdamW of bitsandbytes."""

    train_learning_rate: float = 3e-4
    """Learning rate, which stays as it is."""

    train_adam_beta1: float = 0.9
    """β₁ of Adam."""

    train_adam_beta2: float = 0.999
    """β₂ of Adam."""

    train_adam_weight_decay: float = 1e-4
    """Weight decay of Adam."""

    train_adam_epsilon: float = 1e-8
    """ε of Adam."""

    train_gradient_accumulation_steps: int = 1
    """Training batches per optimizer step, each with all of its denoising steps."""

    train_max_grad_norm: float = 1.0
    """Clip the gradient to this norm."""

    def __post_init__(self) -> None:
        if self.accelerator_kwargs:
            raise ConfigError(
                f"accelerator_kwargs={self.accelerator_kwargs!r} is not available: mixed_precision and log_with have options of "
                "their own; leave it out."
            )
        if self.mixed_precision not in ("fp16", "bf16", "no"):
            raise ConfigError(f"mixed_precision={self.mixed_precision!r}: give 'fp16', 'bf16' or 'no'.")
        if self.log_with not in (None, "wandb", "tensorboard"):
            raise ConfigError(f"log_with={self.log_with!r}: give 'wandb', 'tensorboard' or None.")
        check_bounds(self)
        if self.train_use_8bit_adam:
            check_available("bitsandbytes", to="train_use_8bit_adam")

    def to_dict(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)

    @property
    def output_dir(self) -> str:
        return str(self.project_kwargs.get("project_dir", self.logdir))

    def shared_arguments(self) -> dict[str, Any]:
        """These options by the names of `TrainingArguments`."""
        accelerated = torch.accelerator.is_available() and not os.environ.get("ACCELERATE_USE_CPU")
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = self.allow_tf32
        return {
            "output_dir": self.output_dir,
            "seed": self.seed,
            "num_train_epochs": self.num_epochs,
            "save_total_limit": self.project_kwargs.get("total_limit", self.num_checkpoint_limit),
            "fp16": accelerated and self.mixed_precision == "fp16",
            "bf16": accelerated and self.mixed_precision == "bf16",
            "learning_rate": self.train_learning_rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_bnb_8bit" if self.train_use_8bit_adam else "adamw_torch",
            "adam_beta1": self.train_adam_beta1,
            "adam_beta2": self.train_adam_beta2,
            "adam_epsilon": self.train_adam_epsilon,
            "weight_decay": self.train_adam_weight_decay,
            "max_grad_norm": self.train_max_grad_norm,
            "gradient_accumulation_steps": self.train_gradient_accumulation_steps,
            "gradient_checkpointing": False,
            "report_to": "none",
            "num_pictures": 0,
            "html_report": False,
            "disable_tqdm": True,
        }


@dataclass
class DDPOConfig(ClassicConfig):
    """Options of `DDPOTrainer`."""

    sample_batch_size: int = 1
    """Pictures per call of the reward function, on each process; sampling chooses its batch size itself."""

    sample_num_batches_per_epoch: int = 2
    """Number of batches of sample_batch_size pictures per epoch, on each process."""

    train_batch_size: int = 1
    """Pictures per training batch, on each process."""

    train_num_inner_epochs: int = 1
    """How often each epoch trains on its pictures."""

    train_cfg: bool = True
    """Train with classifier-free guidance, as in sampling."""

    train_adv_clip_max: float = 5.0
    """Clip advantages to ± this."""

    train_clip_range: float = 1e-4
    """Clip the ratio of a denoising step to 1 ± this."""

    train_timestep_fraction: float = 1.0
    """Fraction of each picture's denoising steps to train on, chosen at random in every inner epoch."""

    per_prompt_stat_tracking: bool = False
    """Normalise rewards by mean and standard deviation of earlier ones of the same prompt, not of the epoch."""

    per_prompt_stat_tracking_buffer_size: int = 16
    """Number of rewards to remember for each prompt."""

    per_prompt_stat_tracking_min_count: int = 16
    """Number of rewards of a prompt from which its own statistics are used."""

    async_reward_computation: bool = False
    """Compute the rewards of several batches in parallel, in threads."""

    max_workers: int = 2
    """Number of threads for async_reward_computation."""

    negative_prompts: str = ""
    """Prompt that guidance steers away from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sample_eta > 0:
            raise ConfigError(
                f"sample_eta={self.sample_eta}: give a number above 0, since steps without noise have no likelihood."
            )
        if self.sample_batch_size < self.train_batch_size or self.sample_batch_size % self.train_batch_size:
            raise ConfigError(
                f"sample_batch_size={self.sample_batch_size} has to be a multiple of train_batch_size={self.train_batch_size}."
            )

    def check_batches(self, processes: int) -> None:
        """Raises ConfigError unless an epoch's pictures are a whole number of optimizer steps."""
        pictures = self.sample_batch_size * self.sample_num_batches_per_epoch
        step = self.train_batch_size * self.train_gradient_accumulation_steps
        if pictures % step:
            raise ConfigError(
                f"An epoch has {pictures} pictures on each of {processes} processes (sample_batch_size × "
                f"sample_num_batches_per_epoch), which is no multiple of the {step} of an optimizer step (train_batch_size × "
                "train_gradient_accumulation_steps)."
            )


@dataclass
class AlignPropConfig(ClassicConfig):
    """Options of `AlignPropTrainer`."""

    log_image_freq: int = 1
    """Pass pictures to `image_samples_hook` every so many epochs."""

    train_batch_size: int = 1
    """Pictures per micro-batch; an epoch has train_gradient_accumulation_steps of them."""

    train_learning_rate: float = 1e-3
    """Learning rate, which stays as it is."""

    negative_prompts: str | None = None
    """Prompt that guidance steers away from."""

    truncated_backprop_rand: bool = True
    """Draw the first denoising step that gradients go through at random; else it is truncated_backprop_timestep."""

    truncated_backprop_timestep: int = 49
    """The first denoising step that gradients go through, without truncated_backprop_rand."""

    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50)
    """Range from which truncated_backprop_rand draws that first step."""
