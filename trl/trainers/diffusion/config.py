"""Options shared by the trainers of diffusion models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl.diffusion.solvers import FlowSolver
from trl.errors import ConfigError
from trl.imports import check_available
from trl.trainers.config import TrainerConfig
from trl.trainers.rollout_options import RolloutOptions

OF_LANGUAGE = (
    "chat_template_path",
    "pad_token",
    "eos_token",
    "dataset_num_proc",
    "max_tokens_per_micro_batch",
    "trust_remote_code",
    "disable_dropout",
    "layout",
    "pad_to_multiple_of",
    "max_pixels",
    "min_pixels",
    "image_folder",
    "image_features_mb",
    "adapted_part",
    "activation_offloading",
    "cuda_graphs",
    "router_aux_loss_coef",
)
"""Options of `TrainerConfig` for language models, which have no effect on diffusion models."""


@dataclass
class DiffusionConfig(TrainerConfig):
    """Options of a diffusion model's trainer. Batch sizes count pictures (or pairs of them)."""

    READS_PICTURES: ClassVar[bool] = False
    """Whether rows contain pictures."""

    learning_rate: float = 3e-4

    height: int | None = None
    """Height of pictures in pixels. None: the height that the model was trained with."""

    width: int | None = None
    """Width of pictures in pixels. None: the width that the model was trained with."""

    guidance_scale: float = 4.5
    """Scale of classifier-free guidance (arXiv:2207.12598), in sampling and in training. 1: no guidance."""

    negative_prompt: str | None = None
    """Prompt that classifier-free guidance steers away from. None: the pipeline's default."""

    max_sequence_length: int | None = None
    """Most tokens of a prompt, for the text encoders T5 and Qwen. None: the pipeline's default."""

    max_steps_per_micro_batch: int | None = None
    """Most denoising steps (or pictures) per micro-batch; with guidance each takes two rows. None: 8 on an accelerator,
    64 on a CPU."""

    vae_batch_size: int = 8
    """Number of pictures that the VAE decodes or encodes at a time."""

    ema_decay: float | None = None
    """Keep an exponential moving average of the trained weights, θ̄ ← d θ̄ + (1 − d) θ at each step with this d; evaluation
    and the saved model use it. None: no average."""

    flow_solver: FlowSolver = "sde"
    """Stochastic solver of flow-matching models: "sde" (Flow-GRPO, arXiv:2505.05470) or "cps" (arXiv:2509.05952)."""

    num_inference_steps_eval: int = 40
    """Denoising steps of pictures for evaluation and report, which are sampled deterministically."""

    picture_steps: int = 0
    """Sample pictures for the report, always from the same prompts and noise, every so many optimizer steps. 0: only before
    and after training."""

    num_pictures: int = 8
    """Number of pictures in the report, from the first prompts of the dataset. 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_available("diffusers", to="Training a diffusion model")
        if not isinstance(self.negative_prompt, str | None):
            raise ConfigError(f"negative_prompt={self.negative_prompt!r}: give one text, which goes with every prompt.")
        for name in OF_LANGUAGE:
            is_read = name == "image_folder" and self.READS_PICTURES
            if not is_read and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ConfigError(f"{name}={getattr(self, name)!r} has no effect on a diffusion model: leave it out.")

    @property
    def forward_rows(self) -> int:
        """Most denoising steps (or pictures) per micro-batch."""
        if self.max_steps_per_micro_batch is not None:
            return self.max_steps_per_micro_batch
        return 64 if self.device.type == "cpu" else 8

    @property
    def sampled_at_once(self) -> int:
        """Number of pictures that are sampled at a time."""
        return self.forward_rows


@dataclass
class DiffusionRolloutConfig(RolloutOptions, DiffusionConfig):
    """Options of trainers that train on pictures which the model samples."""

    SAMPLES = "pictures"
    SPLITS = "max_steps_per_micro_batch"

    num_inference_steps: int = 10
    """Denoising steps of the pictures sampled for training; fewer suffice than for good-looking pictures."""

    num_generations_eval: int = 1
    """Pictures of each prompt in evaluation."""

    same_initial_noise: bool = False
    """Start all pictures of a prompt from the same initial noise (DanceGRPO, arXiv:2505.07818)."""

    sample_batch_size: int | None = None
    """Number of pictures that are sampled at a time. None: as many as max_steps_per_micro_batch."""

    advantage_clip: float = 5.0
    """Clip advantages to ± this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_options_of_rows()
        self.check_batches()

    @property
    def sampled_at_once(self) -> int:
        return self.sample_batch_size or self.forward_rows
