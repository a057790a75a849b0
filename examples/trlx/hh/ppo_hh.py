"""PPO of dialogues, with the overlap with the chosen answer as the reward."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, from_command_line
from stand_ins import dialogues, overlap, review_model

import trlx
from trlx.data.default_configs import default_ppo_config

LOCAL = {
    "train": {"seq_length": 96, "batch_size": 8, "total_steps": 32, "eval_interval": 16},
    "train.checkpoint_dir": "ckpts/ppo-hh",
    "tokenizer.truncation_side": "left",
    "model.num_layers_unfrozen": 1,
    "method": {"num_rollouts": 16, "chunk_size": 16},
    "method.gen_kwargs": {"max_new_tokens": 16, "top_p": 1.0},
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_ppo_config(), LOCAL, hparams, model=review_model())
    prompts = [{"prompt": prompt, "chosen": chosen} for prompt, chosen, _ in dialogues()]

    def reward_fn(outputs: list[str], chosen: list[str], **kwargs: object) -> list[float]:
        return overlap(outputs, chosen)

    return trlx.train(
        reward_fn=reward_fn,
        prompts=prompts,
        eval_prompts=prompts[:8],
        config=config,
        stop_sequences=["Human:", "Assistant:"],
    )


if __name__ == "__main__":
    main(from_command_line())
