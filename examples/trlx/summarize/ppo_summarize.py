"""PPO of summaries, with the overlap with human summaries as the reward."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, from_command_line
from stand_ins import overlap, posts, review_model

import trlx
from trlx.data.default_configs import default_ppo_config

LOCAL = {
    "train": {"seq_length": 96, "batch_size": 8, "total_steps": 32, "eval_interval": 16},
    "train.checkpoint_dir": "ckpts/ppo-summarize",
    "model.num_layers_unfrozen": 1,
    "method": {"num_rollouts": 16, "chunk_size": 16, "scale_reward": "running"},
    "method.gen_kwargs.max_new_tokens": 16,
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_ppo_config(), LOCAL, hparams, model=review_model())
    prompts = [{"prompt": post, "summary": summary} for post, summary in posts()]

    def reward_fn(outputs: list[str], summary: list[str], **kwargs: object) -> list[float]:
        return overlap(outputs, summary)

    return trlx.train(reward_fn=reward_fn, prompts=prompts, eval_prompts=prompts[:8], config=config)


if __name__ == "__main__":
    main(from_command_line())
