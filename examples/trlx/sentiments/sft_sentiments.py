"""Fine-tuning on positive reviews."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import review_model, reviews, sentiment

import trlx
from trlx.data.default_configs import TRLConfig, default_sft_config

LOCAL = {
    "train": {"seq_length": 64, "batch_size": 32, "total_steps": 60, "eval_interval": 30, "tracker": None},
    "train.checkpoint_dir": "ckpts/sft-sentiments",
    "optimizer.kwargs.lr": 1e-3,
    "scheduler.kwargs.eta_min": 1e-3,
    "method.gen_kwargs.max_new_tokens": 24,
}


def main(hparams: dict | None = None) -> object:
    name = review_model()
    named = {"model.model_path": name, "tokenizer.tokenizer_path": name}
    config = TRLConfig.update(TRLConfig.update(default_sft_config(), {**LOCAL, **named}), hparams or {})
    texts, labels = reviews()
    positive = sentiment()
    return trlx.train(
        samples=[text for text, label in zip(texts, labels, strict=True) if label == "positive"],
        eval_prompts=[" ".join(text.split()[:4]) for text in texts[:32]],
        metric_fn=lambda samples, **kwargs: {"sentiment": positive(samples)},
        config=config,
    )


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
