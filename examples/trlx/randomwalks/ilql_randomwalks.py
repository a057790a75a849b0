"""ILQL of 1,000 random walks towards the shortest, without a sample in training: `python ilql_randomwalks.py`."""

from __future__ import annotations

import json
import sys

from randomwalks import generate_random_walks, make_tokenizer, model_config

import trlx
from trlx.data.default_configs import (
    ILQLConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)

TOKENIZER = "ckpts/walks-tokenizer"

default_config = TRLConfig(
    train=TrainConfig(
        seq_length=11,
        batch_size=100,
        epochs=40,
        total_steps=400,
        checkpoint_interval=1000,
        eval_interval=100,
        pipeline="PromptPipeline",
        trainer="AccelerateILQLTrainer",
        checkpoint_dir="ckpts/ilql-randomwalks",
        tracker=None,
    ),
    model=ModelConfig(model_path=model_config(), num_layers_unfrozen=-1),
    tokenizer=TokenizerConfig(tokenizer_path=TOKENIZER, truncation_side="right"),
    optimizer=OptimizerConfig(
        name="adamw", kwargs={"lr": 5e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-6}
    ),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 400, "eta_min": 1e-5}),
    method=ILQLConfig(
        name="ILQLConfig",
        tau=0.8,
        gamma=0.99,
        cql_scale=0.1,
        awac_scale=1,
        alpha=0.1,
        beta=0,
        steps_for_target_q_sync=5,
        two_qs=True,
        gen_kwargs={"max_new_tokens": 9, "top_k": 10, "beta": [0, 1, 100], "temperature": 1.0},
    ),
)


def main(hparams: dict | None = None) -> object:
    config = TRLConfig.update(default_config, hparams or {})
    make_tokenizer(config.tokenizer.tokenizer_path)
    metric_fn, eval_prompts, walks, _ = generate_random_walks()
    rewards = metric_fn(walks)["optimality"]
    return trlx.train(
        samples=[[walk[:1], walk[1:]] for walk in walks],
        rewards=rewards,
        eval_prompts=eval_prompts * 10,
        metric_fn=lambda samples, **kwargs: metric_fn(samples),
        config=config,
        stop_sequences=["|"],
    )


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
