"""Rejection-sampling fine-tuning towards positive reviews."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, constant_rate, default_rft_config, from_command_line
from stand_ins import review_model, reviews, sentiment

import trlx

LOCAL = {
    "train": {"seq_length": 48, "batch_size": 16, "total_steps": 60, "eval_interval": 20},
    "train.checkpoint_dir": "ckpts/rft-sentiments",
    "model.num_layers_unfrozen": -1,
    **constant_rate(3e-4),
    "method": {"n_generations_per_prompt": 8},
    "method.gen_kwargs.max_new_tokens": 24,
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_rft_config(), LOCAL, hparams, model=review_model())
    texts, _ = reviews()
    prompts = [" ".join(text.split()[:4]) for text in texts[:32]]
    positive = sentiment()
    return trlx.train(
        reward_fn=lambda samples, **kwargs: positive(samples), prompts=prompts, eval_prompts=prompts, config=config
    )


if __name__ == "__main__":
    main(from_command_line())
