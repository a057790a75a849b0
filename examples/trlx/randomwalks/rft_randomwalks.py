"""Rejection-sampling fine-tuning towards the shortest walks: `python rft_randomwalks.py '{"train.seed": 1}'`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pretrain import FOLDER, shorten_walks
from settings import configuration, cosine, default_rft_config, from_command_line

GOAL, END = 0, 21
"""Tokens at which samples end. The reward ignores what follows the goal; if it were sampled, one good walk with many endings would be
kept as many different samples, and dominate training."""

LOCAL = {
    "train": {
        "seq_length": 10,
        "epochs": 48,
        "total_steps": 1000,
        "batch_size": 16,
        "eval_interval": 24,
        "checkpoint_dir": "ckpts/rft-randomwalks",
    },
    "model.num_layers_unfrozen": -1,
    **cosine(3e-4, 144),
    "optimizer.kwargs": {"betas": (0.9, 0.99), "weight_decay": 0},
    "method": {"start_percentile": 0.9, "end_percentile": 0.95, "n_improve_steps": 1},
    "method.gen_kwargs.max_new_tokens": 9,
    "method.gen_kwargs.eos_token_id": [GOAL, END],
}


def main(hparams: dict | None = None) -> object:
    return shorten_walks(configuration(default_rft_config(), LOCAL, hparams, model=FOLDER))


if __name__ == "__main__":
    main(from_command_line())
