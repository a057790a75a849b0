"""PPO of an encoder-decoder towards positive endings of reviews."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, constant_rate, from_command_line
from stand_ins import encoder_decoder, reviews, sentiment

import trlx
from trlx.data.default_configs import default_ppo_config

LOCAL = {
    "train": {"seq_length": 48, "batch_size": 16, "total_steps": 40, "eval_interval": 20},
    "train.checkpoint_dir": "ckpts/ppo-sentiments-t5",
    "model": {"model_arch_type": "seq2seq", "num_layers_unfrozen": -1},
    **constant_rate(1e-3),
    "method": {"num_rollouts": 32, "chunk_size": 32, "init_kl_coef": 0.05},
    "method.gen_kwargs.max_new_tokens": 16,
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_ppo_config(), LOCAL, hparams, model=encoder_decoder())
    texts, _ = reviews()
    prompts = [" ".join(text.split()[:8]) for text in texts]
    positive = sentiment()
    return trlx.train(
        reward_fn=lambda outputs, **kwargs: positive(outputs), prompts=prompts, eval_prompts=prompts[:16], config=config
    )


if __name__ == "__main__":
    main(from_command_line())
