"""Rejection-sampling fine-tuning towards the shortest walks: `python rft_randomwalks.py '{"train.seed": 1}'`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pretrain import FOLDER, shorten_walks
from settings import configuration, constant_rate, default_rft_config, from_command_line

LOCAL = {
    "train": {
        "seq_length": 10,
        "epochs": 48,
        "total_steps": 1000,
        "batch_size": 50,
        "eval_interval": 16,
        "checkpoint_dir": "ckpts/rft-randomwalks",
    },
    "model.num_layers_unfrozen": -1,
    **constant_rate(3e-4),
    "optimizer.kwargs": {"betas": (0.9, 0.99), "weight_decay": 0},
    "method": {"start_percentile": 0.9, "end_percentile": 0.95},
    "method.gen_kwargs.max_new_tokens": 9,
}


def main(hparams: dict | None = None) -> object:
    return shorten_walks(configuration(default_rft_config(), LOCAL, hparams, model=FOLDER))


if __name__ == "__main__":
    main(from_command_line())
