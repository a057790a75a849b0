"""A model that walks at random: fine-tuned on the random walks, to begin PPO and RFT with."""

from __future__ import annotations

from pathlib import Path

from randomwalks import make_tokenizer, model_config

import trlx
from trlx.data.default_configs import TRLConfig, default_sft_config


def walking_model(folder: str, walks: list[str], seed: int = 1000) -> str:
    """The folder of a model that imitates `walks`, trained there if it is not there yet."""
    if (Path(folder) / "config.json").is_file():
        return folder
    tokenizer = make_tokenizer(folder)
    config = TRLConfig.update(
        default_sft_config(),
        {
            "model.model_path": model_config(),
            "tokenizer.tokenizer_path": tokenizer,
            "optimizer.kwargs.lr": 1e-3,
            "scheduler.kwargs": {"T_max": 160, "eta_min": 1e-5},
            "train": {
                "seq_length": 12,
                "total_steps": 160,
                "epochs": 16,
                "batch_size": 100,
                "eval_interval": 1000,
                "checkpoint_interval": 1000,
                "checkpoint_dir": f"{folder}-training",
                "save_best": False,
                "tracker": None,
                "seed": seed,
            },
            "method.gen_kwargs.max_new_tokens": 9,
        },
    )
    trainer = trlx.train(samples=[[walk[:1], walk[1:]] for walk in walks], config=config, eval_prompts=["b"])
    trainer.save_pretrained(folder)
    return folder
