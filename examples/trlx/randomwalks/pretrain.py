"""Fine-tune a model on random walks, as the initial policy of PPO and RFT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from randomwalks import generate_random_walks, make_tokenizer, model_config
from settings import configuration, cosine

import trlx
from trlx.data.default_configs import TRLConfig, default_sft_config

FOLDER = "ckpts/walking-model"
STEPS = 160

SETTINGS = {
    "train": {
        "seq_length": 12,
        "total_steps": STEPS,
        "epochs": 16,
        "batch_size": 100,
        "eval_interval": 1000,
        "checkpoint_interval": 1000,
        "save_best": False,
    },
    **cosine(1e-3, STEPS),
    "method.gen_kwargs.max_new_tokens": 9,
}


def walking_model(folder: str, walks: list[str], seed: int) -> str:
    """Fine-tune a model on `walks` and save it to `folder`, unless it is there already; return the folder."""
    if (Path(folder) / "config.json").is_file():
        return folder
    own = {"model.model_path": model_config(), "train.checkpoint_dir": f"{folder}-training", "train.seed": seed}
    config = configuration(default_sft_config(), SETTINGS, own, model=make_tokenizer(folder))
    trainer = trlx.train(samples=[[walk[:1], walk[1:]] for walk in walks], config=config, eval_prompts=["b"])
    trainer.save_pretrained(folder)
    return folder


def shorten_walks(config: TRLConfig) -> Any:
    """Train the fine-tuned model towards shortest walks, by the method of `config`."""
    metric_fn, prompts, walks, _ = generate_random_walks()
    walking_model(config.model.model_path, walks, config.train.seed)
    return trlx.train(
        reward_fn=lambda samples, **kwargs: metric_fn(samples)["optimality"],
        prompts=prompts,
        eval_prompts=prompts * 10,
        metric_fn=metric_fn,
        stop_sequences=["|"],
        config=config,
    )
