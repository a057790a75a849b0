"""Options that the trainers of diffusion models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl.algorithms.advantages import RewardAggregation
from trl.diffusion.solvers import FlowSolver
from trl.errors import ConfigError
from trl.trainers.config import TrainerConfig

OF_LANGUAGE = (
    "chat_template_path",
    "pad_token",
    "eos_token",
    "dataset_num_proc",
    "max_tokens_per_micro_batch",
    "trust_remote_code",
    "disable_dropout",
)
"""Options of `TrainerConfig` that are about tokens or text models, and say nothing of a diffusion model."""


@dataclass
class DiffusionConfig(TrainerConfig):
    """Options of a diffusion model's trainer. Batch sizes count pictures (or pairs of them)."""

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
        for name in OF_LANGUAGE:
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} has no effect on a diffusion model: leave it out.")
        for name in ("vae_batch_size", "max_steps_per_micro_batch", "num_inference_steps_eval"):
            self._at_least_one(name)
        for name in ("picture_steps", "num_pictures"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or more.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay}: give a number in [0, 1), such as 0.99.")

    def _at_least_one(self, name: str) -> None:
        value: Any = getattr(self, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: give at least 1.")

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
class DiffusionRolloutConfig(DiffusionConfig):
    """Options of trainers that learn from pictures which the model samples."""

    num_inference_steps: int = 10
    """Denoising steps of pictures that are trained on; fewer do than for pictures to look at."""

    num_generations: int = 8
    """Pictures of each prompt."""

    num_generations_eval: int = 1
    """Pictures of each prompt in evaluation."""

    steps_per_generation: int | None = None
    """Batches of per_device_train_batch_size pictures that a rollout batch is trained on in. None:
    gradient_accumulation_steps, so that every rollout batch is one optimizer step."""

    num_iterations: int = 1
    """How often a rollout batch is gone through."""

    same_initial_noise: bool = False
    """Begin all pictures of a prompt from one noise (DanceGRPO, arXiv:2505.07818)."""

    shuffle_dataset: bool = True
    """Take prompts in a random order, another one each epoch."""

    sample_batch_size: int | None = None
    """Pictures that are sampled at once. None: as many as max_steps_per_micro_batch."""

    reward_weights: list[float] | None = None
    """Weight of each reward function in the sum. None: 1 each."""

    multi_objective_aggregation: RewardAggregation = "sum_then_normalize"
    """"sum_then_normalize", or "normalize_then_sum": each function normalised in its group (GDPO, arXiv:2601.05242)."""

    reward_timeout: float | None = None
    """Seconds that a call of a reward function may take. None: no limit."""

    advantage_clip: float = 5.0
    """Bound of advantages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("num_inference_steps", "num_generations", "num_generations_eval", "num_iterations")
        for name in (*counts, "sample_batch_size", "steps_per_generation"):
            self._at_least_one(name)
        self.check_batches()

    @property
    def sampled_at_once(self) -> int:
        return self.sample_batch_size or self.forward_rows

    @property
    def minibatches_per_rollout_batch(self) -> int:
        """Micro-batches of a rollout batch, on each process."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def prompts_per_rollout_batch(self) -> int:
        """Prompts of a rollout batch, on each process. A group stays whole on one process."""
        return self.per_device_train_batch_size * self.minibatches_per_rollout_batch // self.num_generations

    def check_batches(self) -> None:
        """Raise ConfigError where a rollout batch does not hold whole groups."""
        pictures = self.per_device_train_batch_size * self.minibatches_per_rollout_batch
        if pictures % self.num_generations:
            raise ConfigError(
                f"A rollout batch has {pictures} pictures per process (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} × steps_per_generation={self.minibatches_per_rollout_batch}), which is "
                f"no multiple of num_generations={self.num_generations}: change one of the three."
            )
