"""ILQL of reviews and their sentiment, sampled with several strengths of guidance."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import review_model, reviews, sentiment

import trlx
from trlx.data.default_configs import TRLConfig, default_ilql_config

LOCAL = {
    "train": {"batch_size": 32, "total_steps": 200, "eval_interval": 100, "tracker": None},
    "train.checkpoint_dir": "ckpts/ilql-sentiments",
    "optimizer.kwargs.lr": 1e-3,
    "scheduler.kwargs.eta_min": 1e-3,
    "method.alpha": 0.1,
    "method.gen_kwargs": {"max_new_tokens": 24, "beta": [0, 4]},
}


def main(hparams: dict | None = None) -> object:
    name = review_model()
    named = {"model.model_path": name, "tokenizer.tokenizer_path": name}
    config = TRLConfig.update(TRLConfig.update(default_ilql_config(), {**LOCAL, **named}), hparams or {})
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
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
