"""PPO towards the shortest walks: `python ppo_randomwalks.py '{"train.seed": 1}'`."""

from __future__ import annotations

import json
import sys

from pretrain import walking_model
from randomwalks import generate_random_walks

import trlx
from trlx.data.default_configs import (
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)

FOLDER = "ckpts/walking-model"

default_config = TRLConfig(
    train=TrainConfig(
        seq_length=10,
        epochs=20,
        total_steps=240,
        batch_size=80,
        checkpoint_interval=10000,
        eval_interval=40,
        pipeline="PromptPipeline",
        trainer="AcceleratePPOTrainer",
        checkpoint_dir="ckpts/ppo-randomwalks",
        tracker=None,
    ),
    model=ModelConfig(model_path=FOLDER, num_layers_unfrozen=-1),
    tokenizer=TokenizerConfig(tokenizer_path=FOLDER, truncation_side="right"),
    optimizer=OptimizerConfig(name="adamw", kwargs={"lr": 5.0e-4, "betas": (0.9, 0.95), "eps": 1.0e-8}),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 240, "eta_min": 1.0e-5}),
    method=PPOConfig(
        name="PPOConfig",
        num_rollouts=160,
        chunk_size=160,
        ppo_epochs=2,
        init_kl_coef=0.01,
        target=None,
        horizon=10000,
        gamma=1,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        scale_reward="ignored",
        ref_mean=None,
        ref_std=None,
        cliprange_reward=1,
        gen_kwargs={"max_new_tokens": 9, "top_k": 0, "top_p": 1.0, "do_sample": True},
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
