"""Options of PPO: see `trl.algorithms.ppo` for the formulas they stand in."""

from __future__ import annotations

import sys
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from trl.algorithms.kl_control import AdaptiveKL, FixedKL
from trl.algorithms.ppo import PPO, PPOOptions
from trl.errors import ConfigError, unknown
from trl.option_bounds import check_bounds
from trl.trainers.online_config import OnlineConfig

ACCELERATOR_OPTIONS = ("cpu", "mixed_precision")


@dataclass
class PPOConfig(PPOOptions, OnlineConfig):
    """Options of `PPOTrainer`."""

    ALIASES: ClassVar[dict[str, str]] = {
        **OnlineConfig.ALIASES,
        "kl_coef": "init_kl_coef",
        "num_value_layers_unfrozen": "num_value_layers",
        "num_ppo_epochs": "ppo_epochs",
        "optimize_cuda_cache": "optimize_device_cache",
    }

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    """Name of the experiment; the script's by default."""

    seed: int = 0
    """Seed of every random choice."""

    log_with: str | None = None
    """Tracker of `accelerate` that `log_stats` writes to: "wandb", "tensorboard", …, or a tracker object."""

    task_name: str | None = None
    """Name of the task, for the tracker."""

    model_name: str = "gpt2"
    """Name of the model, for scripts that load it from here, and for the tracker."""

    query_dataset: str = "imdb"
    """Name of the dataset of queries, for scripts that load it from here, and for the tracker."""

    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    """Task and name of the reward model, for scripts that load it from here, and for the tracker."""

    remove_unused_columns: bool = True
    """Accepted for older scripts: the loader of `dataset` keeps all columns, and the collator takes what it needs."""

    tracker_kwargs: dict[str, Any] | str = field(default_factory=dict)
    """Keyword arguments of the tracker, by its name: {"wandb": {"entity": "team"}}."""

    accelerator_kwargs: dict[str, Any] | str = field(default_factory=dict)
    """Older way to set {"mixed_precision": "bf16"} and {"cpu": true}; bf16, fp16 and use_cpu are today's."""

    project_kwargs: dict[str, Any] | str = field(default_factory=dict)
    """Folder of the tracker's files: {"logging_dir": "logs"}."""

    tracker_project_name: str = "trl"
    """Name of the project in the tracker."""

    push_to_hub_if_best_kwargs: dict[str, Any] | str = field(default_factory=dict)
    """Arguments of `push_to_hub`; with them, the model is uploaded whenever the mean score is the best so far."""

    compare_steps: int = 1
    """Steps between two such comparisons."""

    steps: int = 20_000
    """Samples that a script means to train on in all; read by scripts."""

    learning_rate: float = 1.41e-5

    batch_size: int = 128
    """Triplets of one `step`, per process."""

    mini_batch_size: int = 128
    """Triplets of one forward and backward pass; at most `batch_size`."""

    forward_batch_size: int | None = None
    """Older name of `mini_batch_size`."""

    per_device_train_batch_size: int | None = None
    """Another name of `mini_batch_size`."""

    steps_per_generation: int | None = None
    """Mini-batches of a batch: sets `batch_size`."""

    num_iterations: int | None = None
    """Another name of `ppo_epochs`."""

    num_generations: int = 1
    """Responses that `train` samples to each prompt."""

    max_completion_length: int | None = 53
    """Tokens that `train` samples at most per response. None: as many as the model's context leaves."""

    gradient_accumulation_steps: int = 1
    """Mini-batches of one optimizer step."""

    ppo_epochs: int = 4
    """Times that a batch is learned from."""

    max_grad_norm: float | None = None
    """Longest gradient; longer ones are scaled down to it. None: no limit."""

    optimize_device_cache: bool = False
    """Give cached memory of the device back after every step: slower, and smaller between steps."""

    gradient_checkpointing: bool = False
    """Compute activations again in backward instead of keeping them."""

    adap_kl_ctrl: bool = True
    """Adapt the coefficient of the KL penalty, so that the KL stays near `target`."""

    init_kl_coef: float = 0.2
    """Coefficient of the KL penalty; its first value if it is adapted."""

    target: float = 6
    """KL of a response, in nats, that the adapted coefficient aims at."""

    horizon: float = 10_000
    """Responses over which the coefficient adapts: after n of them it has changed by at most 20 % · n / horizon."""

    num_value_layers: int = 0
    """Upper layers of which the value has a copy of its own, on the policy's lower ones. 0: a linear head alone."""

    early_stopping: bool = False
    """End the epochs over a batch once, after one of them, the policy has moved by more than 1.5 `target_kl`. In `train` the
    next rollout batch is then sampled; the number of optimizer steps stays as planned."""

    target_kl: float = 1
    """KL per token, in nats, of the policy from the one that sampled, in the last optimizer step: for `early_stopping`."""

    disable_dropout: bool = True
    """Set every dropout probability of the model to zero, so that ratios come from training alone."""

    trust_remote_code: InitVar[bool] = False
    """Allow code that comes with a model or tokenizer to run."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *OnlineConfig._VALID_DICT_FIELDS,
        "tracker_kwargs",
        "accelerator_kwargs",
        "project_kwargs",
        "push_to_hub_if_best_kwargs",
    ]

    def __post_init__(self, trust_remote_code: bool) -> None:
        self.trust_remote_code = trust_remote_code
        self._read_accelerator_kwargs()
        self._size_batches()
        super().__post_init__()
        if self.use_score_norm and not self.use_score_scaling:
            raise ConfigError("use_score_norm=True centres scores that are scaled: set use_score_scaling=True as well.")
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ConfigError('push_to_hub_if_best_kwargs needs a "repo_id" to upload to.')

    def _read_accelerator_kwargs(self) -> None:
        if not isinstance(self.accelerator_kwargs, dict):
            return
        for name in self.accelerator_kwargs:
            if name not in ACCELERATOR_OPTIONS:
                raise ConfigError(unknown("entry of accelerator_kwargs", name, ACCELERATOR_OPTIONS))
        precision = self.accelerator_kwargs.get("mixed_precision")
        self.use_cpu = self.use_cpu or self.accelerator_kwargs.get("cpu", False)
        self.fp16 = self.fp16 or precision == "fp16"
        self.bf16 = self.bf16 if precision is None else precision == "bf16"

    def _size_batches(self) -> None:
        """Settle batch, mini-batch and epochs, whichever of their names were given."""
        check_bounds(self)
        self.mini_batch_size = self.forward_batch_size or self.per_device_train_batch_size or self.mini_batch_size
        self.ppo_epochs = self.num_iterations or self.ppo_epochs
        self.batch_size = (
            self.mini_batch_size * self.steps_per_generation if self.steps_per_generation else self.batch_size
        )
        if self.mini_batch_size > self.batch_size:
            self.mini_batch_size = max(1, self.batch_size // self.gradient_accumulation_steps)
        if self.batch_size % self.backward_batch_size:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of mini_batch_size × gradient_accumulation_steps = "
                f"{self.mini_batch_size} × {self.gradient_accumulation_steps} = {self.backward_batch_size}, the triplets of "
                "one optimizer step."
            )
        self.per_device_train_batch_size, self.num_iterations = self.mini_batch_size, self.ppo_epochs
        self.steps_per_generation = self.batch_size // self.mini_batch_size

    @property
    def backward_batch_size(self) -> int:
        """Triplets of one optimizer step."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    def make_algorithm(self) -> PPO:
        """The algorithm that these options describe."""
        adaptive = AdaptiveKL(self.init_kl_coef, self.target, self.horizon)
        options = {name: getattr(self, name) for name in PPOOptions.__dataclass_fields__}
        return PPO(controller=adaptive if self.adap_kl_ctrl else FixedKL(self.init_kl_coef), **options)
