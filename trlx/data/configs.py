"""The configuration of a run: six sections, as dataclasses, dicts or YAML.

config = TRLConfig.load_yaml("ppo.yml")
config = TRLConfig.update(config, {"method.init_kl_coef": 0.05, "train": {"seed": 1}})
config = config.evolve(optimizer={"kwargs": {"lr": 1e-5}})
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl.cli.parser import read_yaml
from trl.errors import ConfigError, suggest, unknown
from trlx.data.method_configs import MethodConfig, get_method
from trlx.data.sections import Section, merged, nested

SIDES = ("left", "right")
COUNTS = (
    "total_steps",
    "seq_length",
    "epochs",
    "batch_size",
    "checkpoint_interval",
    "eval_interval",
    "minibatch_size",
)
"""Options of `TrainConfig` that must be at least 1."""


@dataclass
class ModelConfig(Section):
    """Which model, and which of its layers are trained."""

    model_path: Any
    """Name or folder of a model; a `PretrainedConfig` gives one with random weights."""

    model_arch_type: str = "causal"
    """"causal", or "seq2seq" for an encoder-decoder."""

    num_layers_unfrozen: int = -1
    """Number of upper layers to train; the others and the embeddings are frozen. −1: train all. 0: only the heads."""

    peft_config: Any = None
    """Adapter to train: a configuration of peft, or its dict. None: no adapter."""

    model_extra_configs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of `from_pretrained`."""


@dataclass
class TokenizerConfig(Section):
    """Which tokenizer, and on which sides it pads and truncates."""

    tokenizer_path: str
    """Name or folder of a tokenizer."""

    padding_side: str = "left"
    """Side on which the tokenizer pads, as in a pipeline's `create_loader`; training does not depend on it."""

    truncation_side: str = "right"
    """Side on which long prompts and samples are truncated."""

    tokenizer_extra_configs: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of `from_pretrained`."""

    def __post_init__(self) -> None:
        for name in ("padding_side", "truncation_side"):
            if getattr(self, name) not in SIDES:
                raise ConfigError(unknown(f"tokenizer.{name}", str(getattr(self, name)), SIDES))


@dataclass
class OptimizerConfig(Section):
    """Which optimizer, and its arguments."""

    name: str
    """"adam", "adamw", "adam_8bit_bnb", "adamw_8bit_bnb" or "sgd"."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Its arguments: lr, betas, eps, weight_decay, momentum."""


@dataclass
class SchedulerConfig(Section):
    """Schedule of the learning rate."""

    name: str
    """"cosine_annealing" or "linear"."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments: T_max and eta_min of "cosine_annealing"; total_iters, start_factor and end_factor of "linear"."""


@dataclass
class TrainConfig(Section):
    """Length of training, batch sizes, evaluation, checkpoints and tracking."""

    total_steps: int
    """Maximum number of optimizer steps."""

    seq_length: int
    """Maximum number of tokens of a prompt and its output together."""

    epochs: int
    """Maximum number of passes over the samples, or of rollout rounds if training is online."""

    batch_size: int
    """Samples of one optimizer step, per process."""

    checkpoint_interval: int
    """Optimizer steps between two checkpoints."""

    eval_interval: int
    """Optimizer steps between two evaluations."""

    pipeline: str = "PromptPipeline"
    """Name of the registered pipeline that reads the prompts."""

    trainer: str = "AcceleratePPOTrainer"
    """Name of the registered trainer."""

    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the trainer's class."""

    project_name: str = "trlx"
    """Project, in the tracker."""

    run_name: str | None = None
    """Name of the run, in the tracker."""

    entity_name: str | None = None
    """Entity, in the tracker."""

    group_name: str | None = None
    """Group of runs, in the tracker."""

    checkpoint_dir: str = "ckpts"
    """Folder of checkpoints."""

    rollout_logging_dir: str | None = None
    """Folder to write rollouts to, as JSON."""

    save_best: bool = True
    """Keep the model with the best mean reward in `best_checkpoint`."""

    save_optimizer: bool = True
    """Save what resuming needs beside the model."""

    resume_from_checkpoint: str | None = None
    """Folder of a checkpoint to resume from."""

    tracker: str | None = "wandb"
    """"wandb", "tensorboard" or None."""

    logging_dir: str | None = None
    """Folder of the tracker's files."""

    tags: list[str] = field(default_factory=list)
    """Tags, in the tracker."""

    seed: int = 1000
    """Seed of every random choice."""

    minibatch_size: int | None = None
    """Samples per forward and backward pass, which does not change the optimizer step. None: `batch_size`."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value >= 1):
                raise ConfigError(f"train.{name}={value!r}: give a number of at least 1.")


SECTIONS = {
    "method": MethodConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "tokenizer": TokenizerConfig,
    "train": TrainConfig,
}


@dataclass
class TRLConfig:
    """All sections of a run."""

    method: MethodConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    tokenizer: TokenizerConfig
    train: TrainConfig

    @classmethod
    def load_yaml(cls, yml_fp: str | Path) -> TRLConfig:
        """Load the configuration from a YAML file with a mapping for every section."""
        config = read_yaml(str(yml_fp), "load_yaml")
        if not isinstance(config, dict):
            raise ConfigError(
                f"{str(yml_fp)!r} holds a {type(config).__name__}: a configuration is a mapping of sections."
            )
        return cls.from_dict(config)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the configuration as nested dicts, copied."""
        return {name: getattr(self, name).to_dict() for name in SECTIONS}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TRLConfig:
        """Make a configuration from nested dicts. Raises ConfigError for sections and parameters that are unknown or missing."""
        for name in config:
            if name not in SECTIONS:
                raise ConfigError(
                    f"The configuration has no section {name!r}.{suggest(name, SECTIONS)} It has: {', '.join(SECTIONS)}."
                )
        if missing := [name for name in SECTIONS if name not in config]:
            raise ConfigError(
                f"The configuration lacks {', '.join(missing)}: it has the sections {', '.join(SECTIONS)}."
            )
        if "name" not in config["method"]:
            raise ConfigError(
                "method.name is missing: give PPOConfig, ILQLConfig, SFTConfig, RFTConfig, or the name of a method that you registered."
            )
        kinds = {**SECTIONS, "method": get_method(config["method"]["name"])}
        return cls(**{name: kind.from_dict(config[name]) for name, kind in kinds.items()})

    def evolve(self, **kwargs: Any) -> TRLConfig:
        """Return the configuration with changes: `config.evolve(method={"gamma": 0.99}, train={"seed": 1})`."""
        return TRLConfig.update(self, kwargs)

    @classmethod
    def update(cls, baseconfig: Mapping[str, Any] | TRLConfig, config: Mapping[str, Any]) -> TRLConfig:
        """Return `baseconfig` with changes, as nested dicts or with dotted keys: `{"train.seed": 1, "method": {"gamma": 0.99}}`.

        Raises ConfigError, which is a ValueError, for an unknown section or parameter.
        """
        base = baseconfig.to_dict() if isinstance(baseconfig, TRLConfig) else baseconfig
        return cls.from_dict(merged(base, nested(config)))

    def __str__(self) -> str:
        return json.dumps(self.to_dict(), indent=4, default=str)
