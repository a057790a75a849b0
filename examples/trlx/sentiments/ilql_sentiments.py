"""ILQL on reviews, with their sentiment as the reward; evaluated with several strengths of guidance."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, constant_rate, from_command_line
from stand_ins import review_model, reviews, sentiment

import trlx
from trlx.data.default_configs import default_ilql_config

LOCAL = {
    "train": {"batch_size": 32, "total_steps": 200, "eval_interval": 100},
    "train.checkpoint_dir": "ckpts/ilql-sentiments",
    **constant_rate(1e-3),
    "method.alpha": 0.1,
    "method.gen_kwargs": {"max_new_tokens": 24, "beta": [0, 4]},
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_ilql_config(), LOCAL, hparams, model=review_model())
    texts, labels = reviews()
    positive = sentiment()
    return trlx.train(
        samples=texts,
        rewards=[float(label == "positive") for label in labels],
        eval_prompts=[" ".join(text.split()[:4]) for text in texts[:32]],
        metric_fn=lambda samples, **kwargs: {"sentiment": positive(samples)},
        config=config,
    )


if __name__ == "__main__":
    main(from_command_line())
