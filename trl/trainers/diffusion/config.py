"""Options that the trainers of diffusion models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl.diffusion.solvers import FlowSolver
from trl.errors import ConfigError
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
"""Options of `TrainerConfig` that are about tokens or language models, and say nothing of a diffusion model."""


@dataclass
class DiffusionConfig(TrainerConfig):
    """Options of a diffusion model's trainer. Batch sizes count pictures (or pairs of them)."""

    READS_PICTURES: ClassVar[bool] = False
    """Whether rows hold pictures."""

    learning_rate: float = 3e-4

    height: int | None = None
    """Height of pictures in pixels. None: that of the pictures which the model was trained on."""

    width: int | None = None
    """Width of pictures in pixels. None: that of the pictures which the model was trained on."""

    guidance_scale: float = 4.5
    """Classifier-free guidance (arXiv:2207.12598) of pictures that are sampled, and of steps that are trained on. 1: none."""

    negative_prompt: str | None = None
    """What classifier-free guidance leads away from. None: what the pipeline takes by itself."""

    max_sequence_length: int | None = None
    """Tokens of a prompt at most, for T5 and Qwen. None: as many as the pipeline takes."""

    max_steps_per_micro_batch: int | None = None
    """Denoising steps (or pictures) that share a forward pass at most; two rows each with guidance. None: 8 on an
    accelerator, 64 on a CPU."""

    vae_batch_size: int = 8
    """Pictures that the VAE decodes or encodes at once."""

    ema_decay: float | None = None
    """Keep an average of the trained weights, θ̄ ← d θ̄ + (1 − d) θ at each step with this d; evaluation and what is saved
    at the end use it. None: no average."""

    flow_solver: FlowSolver = "sde"
    """Stochastic solver of flow-matching models: "sde" (Flow-GRPO, arXiv:2505.05470) or "cps" (arXiv:2509.05952)."""

    num_inference_steps_eval: int = 40
    """Denoising steps of pictures in evaluation and in the report, without noise between them."""

    picture_steps: int = 0
    """Sample the same prompts with the same noise every so many optimizer steps, for the report. 0: before and after
    alone."""

    num_pictures: int = 8
    """So many of them, from the first prompts of the dataset. 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.negative_prompt, str | None):
            raise ConfigError(f"negative_prompt={self.negative_prompt!r}: give one text, which goes with every prompt.")
        for name in OF_LANGUAGE:
            is_read = name == "image_folder" and self.READS_PICTURES
            if not is_read and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ConfigError(f"{name}={getattr(self, name)!r} has no effect on a diffusion model: leave it out.")

    @property
    def forward_rows(self) -> int:
        """Denoising steps that share a forward pass."""
        if self.max_steps_per_micro_batch is not None:
            return self.max_steps_per_micro_batch
        return 64 if self.device.type == "cpu" else 8

    @property
    def sampled_at_once(self) -> int:
        """Pictures that are sampled at once."""
        return self.forward_rows


@dataclass
class DiffusionRolloutConfig(RolloutOptions, DiffusionConfig):
    """Options of trainers that learn from pictures which the model samples."""

    SAMPLES = "pictures"

    num_inference_steps: int = 10
    """Denoising steps of pictures that are trained on; fewer do than for pictures to look at."""

    num_generations_eval: int = 1
    """Pictures of each prompt in evaluation."""

    same_initial_noise: bool = False
    """Begin all pictures of a prompt from one noise (DanceGRPO, arXiv:2505.07818)."""

    sample_batch_size: int | None = None
    """Pictures that are sampled at once. None: as many as max_steps_per_micro_batch."""

    advantage_clip: float = 5.0
    """Bound of advantages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_batches()

    @property
    def sampled_at_once(self) -> int:
        return self.sample_batch_size or self.forward_rows
