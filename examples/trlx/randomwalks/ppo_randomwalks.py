"""PPO towards the shortest walks: `python ppo_randomwalks.py '{"train.seed": 1}'`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pretrain import FOLDER, shorten_walks
from settings import configuration, cosine, from_command_line

from trlx.data.default_configs import default_ppo_config

STEPS = 240

LOCAL = {
    "train": {
        "seq_length": 10,
        "epochs": 20,
        "total_steps": STEPS,
        "batch_size": 80,
        "eval_interval": 40,
        "checkpoint_dir": "ckpts/ppo-randomwalks",
    },
    "model.num_layers_unfrozen": -1,
    **cosine(5e-4, STEPS),
    "optimizer.kwargs.weight_decay": 0.01,
    "method": {
        "num_rollouts": 160,
        "chunk_size": 160,
        "ppo_epochs": 2,
        "init_kl_coef": 0.01,
        "vf_coef": 0.1,
        "cliprange_reward": 1,
    },
    "method.gen_kwargs.max_new_tokens": 9,
}


def main(hparams: dict | None = None) -> object:
    return shorten_walks(configuration(default_ppo_config(), LOCAL, hparams, model=FOLDER))


if __name__ == "__main__":
    main(from_command_line())
