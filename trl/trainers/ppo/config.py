"""Options of PPO: see `trl.algorithms.ppo` for the formulas."""

from __future__ import annotations

import sys
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import LoggerType

from trl.algorithms.kl_control import AdaptiveKL, FixedKL
from trl.algorithms.ppo import PPO, PPOOptions
from trl.errors import ConfigError
from trl.option_bounds import check_bounds
from trl.trainers.mapping_options import check_names, read_mapping
from trl.trainers.online_config import OnlineConfig

ACCELERATOR_OPTIONS = ("cpu", "mixed_precision")

SAME = (("mini_batch_size", "forward_batch_size", "per_device_train_batch_size"), ("ppo_epochs", "num_iterations"))
"""Names of one and the same option."""


@dataclass
class PPOConfig(PPOOptions, OnlineConfig):
    """Options of `PPOTrainer`."""

    EXCLUSIVE: ClassVar[tuple[tuple[str, ...], ...]] = (*SAME, ("batch_size", "steps_per_generation"))
    ALIASES: ClassVar[dict[str, str]] = {
        **OnlineConfig.ALIASES,
        "kl_coef": "init_kl_coef",
        "num_value_layers_unfrozen": "num_value_layers",
        "num_ppo_epochs": "ppo_epochs",
        "optimize_cuda_cache": "optimize_device_cache",
        "is_encoder_decoder": "",
        "is_peft_model": "",
    }

    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    """Name of the experiment; the script's by default."""

    seed: int = 0
    """Seed of every random choice."""

    log_with: str | None = None
    """Tracker of `accelerate` that `log_stats` logs to: "wandb", "tensorboard", …, or a tracker object."""

    task_name: str | None = None
    """Name of the task, for the tracker."""

    model_name: str = "gpt2"
    """Name of the model, for scripts that read it from the configuration, and for the tracker."""

    query_dataset: str = "imdb"
    """Name of the dataset of queries, for scripts that read it from the configuration, and for the tracker."""

    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    """Task and name of the reward model, for scripts that read it from the configuration, and for the tracker."""

    remove_unused_columns: bool = True
    """Accepted for older scripts, without effect: `dataloader` passes all columns to the collator."""

    tracker_kwargs: dict[str, Any] | str = field(default_factory=dict)
    """Keyword arguments of the tracker, by its name: {"wandb": {"entity": "team"}}."""

    accelerator_kwargs: dict[str, Any] | str = field(default_factory=dict)
    """Older way to set {"mixed_precision": "bf16"} and {"cpu": true}; new code sets bf16, fp16 and use_cpu."""

    project_kwargs: dict[str, Any] | str = field(default_factory=dict)
    """Folder of the tracker's files: {"logging_dir": "logs"}."""

    tracker_project_name: str = "trl"
    """Name of the project in the tracker."""

    push_to_hub_if_best_kwargs: dict[str, Any] | str = field(default_factory=dict)
    """Arguments of `push_to_hub`; if given, `step` uploads the model whenever its mean score is the best so far."""

    compare_steps: int = 1
    """Steps between two comparisons with the best mean score, for push_to_hub_if_best_kwargs."""

    steps: int = 20_000
    """Total number of samples to train on; for scripts, which read it from the configuration."""

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
    """Mini-batches per batch: sets `batch_size` to mini_batch_size × this."""

    num_iterations: int | None = None
    """Another name of `ppo_epochs`."""

    num_generations: int = 1
    """Responses that `train` samples for each prompt."""

    max_completion_length: int | None = 53
    """Most tokens of a response that `train` samples. None: as many as fit into the model's context after the prompt."""

    gradient_accumulation_steps: int = 1
    """Mini-batches per optimizer step."""

    ppo_epochs: int = 4
    """Number of epochs over each batch."""

    max_grad_norm: float | None = None
    """Clip the gradient to this norm. None: no clipping."""

    optimize_device_cache: bool = False
    """Free PyTorch's cached GPU memory after every `step`: slower, but other processes can use the memory between steps."""

    gradient_checkpointing: bool = False
    """Recompute activations in backward instead of storing them."""

    adap_kl_ctrl: bool = True
    """Adapt the coefficient of the KL penalty, so that the KL stays near `target`."""

    init_kl_coef: float = 0.2
    """Coefficient of the KL penalty; the initial one with adap_kl_ctrl=True."""

    target: float = 6
    """Target of the mean KL per response, in nats, for adap_kl_ctrl."""

    horizon: float = 10_000
    """How slowly adap_kl_ctrl adapts: n responses change the coefficient by at most 20 % · n / horizon."""

    num_value_layers: int = 0
    """Number of upper layers that the value function copies and trains itself, on top of the policy's lower layers. 0: only a
    linear value head."""

    early_stopping: bool = False
    """Skip the remaining epochs over a batch once the policy has moved by more than 1.5 `target_kl`. `train` then samples
    the next rollout batch; the number of optimizer steps does not change."""

    target_kl: float = 1
    """KL per token, in nats, between the old policy and the current one in the last optimizer step, for `early_stopping`."""

    disable_dropout: bool = True
    """Set every dropout probability of the model to zero, so that ratios differ from 1 only by training."""

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
        self.make_algorithm()
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ConfigError('push_to_hub_if_best_kwargs needs a "repo_id" to upload to.')
        if isinstance(self.log_with, str):
            check_names("tracker_kwargs", self.tracker_kwargs, LoggerType.list())

    def _read_accelerator_kwargs(self) -> None:
        given = read_mapping("accelerator_kwargs", self.accelerator_kwargs)
        check_names("accelerator_kwargs", given, ACCELERATOR_OPTIONS)
        precision = given.get("mixed_precision")
        self.use_cpu = self.use_cpu or given.get("cpu", False)
        self.fp16 = self.fp16 or precision == "fp16"
        self.bf16 = self.bf16 if precision is None else precision == "bf16"

    def _size_batches(self) -> None:
        """Set the batch size, mini-batch size and number of epochs under all of their names."""
        check_bounds(self)
        self._check_sizes()
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

    def _check_sizes(self) -> None:
        """Raises ConfigError for different values of an option under two of its names, as `dataclasses.replace` may give."""
        for names in SAME:
            given = {
                name: getattr(self, name)
                for name in names
                if getattr(self, name) not in (None, getattr(PPOConfig, name))
            }
            if len({*given.values()}) > 1:
                both = " and ".join(f"{name}={value}" for name, value in given.items())
                raise ConfigError(f"{both} are names of one option: give one of them, or the same value for all.")
        size = self.forward_batch_size or self.per_device_train_batch_size or self.mini_batch_size
        many = self.steps_per_generation
        if many and self.batch_size not in (PPOConfig.batch_size, size * many):
            raise ConfigError(
                f"batch_size={self.batch_size} is not mini_batch_size × steps_per_generation = {size} × {many}: leave one of "
                "them out."
            )

    @property
    def total_ppo_epochs(self) -> int:
        """Number of batches until `steps` triplets were trained on, for scripts that stop there."""
        return -(-self.steps // self.batch_size)

    @property
    def backward_batch_size(self) -> int:
        """Triplets of one optimizer step."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    def make_algorithm(self) -> PPO:
        """The algorithm that these options describe."""
        adaptive = AdaptiveKL(self.init_kl_coef, self.target, self.horizon)
        options = {name: getattr(self, name) for name in PPOOptions.__dataclass_fields__}
        return PPO(controller=adaptive if self.adap_kl_ctrl else FixedKL(self.init_kl_coef), **options)
