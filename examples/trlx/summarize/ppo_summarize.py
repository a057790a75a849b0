"""PPO of summaries, rewarded by what they share with those of people."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import overlap, posts, review_model

import trlx
from trlx.data.default_configs import TRLConfig, default_ppo_config

LOCAL = {
    "train": {"seq_length": 96, "batch_size": 8, "total_steps": 32, "eval_interval": 16, "tracker": None},
    "train.checkpoint_dir": "ckpts/ppo-summarize",
    "model.num_layers_unfrozen": 1,
    "method": {"num_rollouts": 16, "chunk_size": 16, "scale_reward": "running"},
    "method.gen_kwargs.max_new_tokens": 16,
}


def main(hparams: dict | None = None) -> object:
    name = review_model()
    named = {"model.model_path": name, "tokenizer.tokenizer_path": name}
    config = TRLConfig.update(TRLConfig.update(default_ppo_config(), {**LOCAL, **named}), hparams or {})
    prompts = [{"prompt": post, "summary": summary} for post, summary in posts()]

    def reward_fn(outputs: list[str], summary: list[str], **kwargs: object) -> list[float]:
        return overlap(outputs, summary)

    return trlx.train(reward_fn=reward_fn, prompts=prompts, eval_prompts=prompts[:8], config=config)


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
