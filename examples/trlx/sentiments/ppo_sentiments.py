"""PPO towards positive reviews: `python ppo_sentiments.py '{"train.total_steps": 100}'`; see ../stand_ins.py for the names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, constant_rate, from_command_line
from stand_ins import review_model, reviews, sentiment

import trlx
from trlx.data.default_configs import default_ppo_config

LOCAL = {
    "train": {"seq_length": 48, "batch_size": 32, "total_steps": 160, "eval_interval": 40},
    "train.checkpoint_dir": "ckpts/ppo-sentiments",
    "model.num_layers_unfrozen": -1,
    **constant_rate(3e-4),
    "method": {"num_rollouts": 64, "chunk_size": 64, "init_kl_coef": 0.05},
    "method.gen_kwargs.max_new_tokens": 24,
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_ppo_config(), LOCAL, hparams, model=review_model())
    texts, _ = reviews()
    prompts = [" ".join(text.split()[:4]) for text in texts]
    positive = sentiment()
    return trlx.train(
        reward_fn=lambda samples, **kwargs: positive(samples),
        prompts=prompts,
        eval_prompts=prompts[:32],
        config=config,
    )


if __name__ == "__main__":
    main(from_command_line())
