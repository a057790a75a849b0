"""Fine-tuning on positive reviews."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, constant_rate, from_command_line
from stand_ins import review_model, reviews, sentiment

import trlx
from trlx.data.default_configs import default_sft_config

LOCAL = {
    "train": {"seq_length": 64, "batch_size": 32, "total_steps": 60, "eval_interval": 30},
    "train.checkpoint_dir": "ckpts/sft-sentiments",
    **constant_rate(1e-3),
    "method.gen_kwargs.max_new_tokens": 24,
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_sft_config(), LOCAL, hparams, model=review_model())
    texts, labels = reviews()
    positive = sentiment()
    return trlx.train(
        samples=[text for text, label in zip(texts, labels, strict=True) if label == "positive"],
        eval_prompts=[" ".join(text.split()[:4]) for text in texts[:32]],
        metric_fn=lambda samples, **kwargs: {"sentiment": positive(samples)},
        config=config,
    )


if __name__ == "__main__":
    main(from_command_line())
