"""Rejection-sampling fine-tuning towards the shortest walks: `python rft_randomwalks.py '{"train.seed": 1}'`."""

from __future__ import annotations

import json
import sys

from pretrain import walking_model
from randomwalks import generate_random_walks

import trlx
from trlx.data.default_configs import (
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)
from trlx.trainer.accelerate_rft_trainer import RFTConfig

FOLDER = "ckpts/walking-model"

default_config = TRLConfig(
    train=TrainConfig(
        seq_length=10,
        epochs=48,
        total_steps=1000,
        batch_size=50,
        checkpoint_interval=1000,
        eval_interval=16,
        pipeline="PromptPipeline",
        trainer="AccelerateRFTTrainer",
        checkpoint_dir="ckpts/rft-randomwalks",
        tracker=None,
    ),
    model=ModelConfig(model_path=FOLDER, num_layers_unfrozen=-1),
    tokenizer=TokenizerConfig(tokenizer_path=FOLDER, truncation_side="right"),
    optimizer=OptimizerConfig(
        name="adamw", kwargs={"lr": 3.0e-4, "betas": (0.9, 0.99), "eps": 1.0e-8, "weight_decay": 0}
    ),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 1e12, "eta_min": 3.0e-4}),
    method=RFTConfig(
        name="RFTConfig",
        n_generations_per_prompt=32,
        start_percentile=0.9,
        end_percentile=0.95,
        n_improve_steps=4,
        gen_kwargs={"max_new_tokens": 9, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "do_sample": True},
    ),
)


def main(hparams: dict | None = None) -> object:
    config = TRLConfig.update(default_config, hparams or {})
    metric_fn, prompts, walks, _ = generate_random_walks()
    walking_model(config.model.model_path, walks, seed=config.train.seed)
    return trlx.train(
        reward_fn=lambda samples, **kwargs: metric_fn(samples)["optimality"],
        prompts=prompts,
        eval_prompts=prompts * 10,
        metric_fn=metric_fn,
        stop_sequences=["|"],
        config=config,
    )


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
