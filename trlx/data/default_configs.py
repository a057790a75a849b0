"""Default configurations of the methods."""

from __future__ import annotations

from typing import Any, NoReturn

from trl.errors import ConfigError
from trlx.data.configs import (
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)
from trlx.models.modeling_ilql import ILQLConfig
from trlx.models.modeling_ppo import PPOConfig
from trlx.trainer.accelerate_sft_trainer import SFTConfig


def _config(method: Any, model: ModelConfig, rate: float, **train: Any) -> TRLConfig:
    """A configuration with the common settings: GPT-2's tokenizer, AdamW, constant learning rate `rate`."""
    options = {"lr": rate, "betas": (0.9, 0.95), "eps": 1.0e-8, "weight_decay": 1.0e-6}
    return TRLConfig(
        method=method,
        model=model,
        optimizer=OptimizerConfig(name="adamw", kwargs=options),
        scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 1e12, "eta_min": rate}),
        tokenizer=TokenizerConfig(tokenizer_path="gpt2", truncation_side="right"),
        train=TrainConfig(epochs=100, eval_interval=100, pipeline="PromptPipeline", **train),
    )


def default_ppo_config() -> TRLConfig:
    """PPO of a GPT-2 that was fine-tuned on film reviews."""
    return _config(
        PPOConfig(),
        ModelConfig(model_path="lvwerra/gpt2-imdb", num_layers_unfrozen=2),
        3e-5,
        seq_length=1024,
        total_steps=10000,
        batch_size=32,
        checkpoint_interval=10000,
        trainer="AcceleratePPOTrainer",
    )


def default_ilql_config() -> TRLConfig:
    """ILQL of GPT-2."""
    return _config(
        ILQLConfig(),
        ModelConfig(model_path="gpt2", num_layers_unfrozen=-1),
        5e-5,
        seq_length=64,
        total_steps=1000,
        batch_size=128,
        checkpoint_interval=1000,
        trainer="AccelerateILQLTrainer",
    )


def default_sft_config() -> TRLConfig:
    """Fine-tuning of GPT-2."""
    return _config(
        SFTConfig(),
        ModelConfig(model_path="gpt2", num_layers_unfrozen=-1),
        1e-4,
        seq_length=1024,
        total_steps=1000,
        batch_size=8,
        checkpoint_interval=10000,
        trainer="AccelerateSFTTrainer",
    )


def _refuse_nemo(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "NeMo's trainers are not supported. FSDP or ZeRO train large models in shards: use default_ppo_config(), "
        "default_ilql_config() or default_sft_config(), and `accelerate launch` the script."
    )


default_nemo_20b_config = default_nemo_2b_config = default_nemo_1_3b_config = _refuse_nemo
