"""ILQL on 1,000 random walks, offline, towards the shortest walks: `python ilql_randomwalks.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from randomwalks import generate_random_walks, make_tokenizer, model_config
from settings import configuration, cosine, from_command_line

import trlx
from trlx.data.default_configs import default_ilql_config

STEPS = 400
TOKENIZER = "ckpts/walks-tokenizer"

LOCAL = {
    "train": {
        "seq_length": 11,
        "batch_size": 100,
        "epochs": 40,
        "total_steps": STEPS,
        "eval_interval": 100,
        "checkpoint_dir": "ckpts/ilql-randomwalks",
    },
    "model.model_path": model_config(),
    **cosine(5e-4, STEPS),
    "method": {"tau": 0.8, "alpha": 0.1},
    "method.gen_kwargs": {"max_new_tokens": 9, "top_k": 10, "beta": [0, 1, 100]},
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_ilql_config(), LOCAL, hparams, model=make_tokenizer(TOKENIZER))
    metric_fn, eval_prompts, walks, _ = generate_random_walks()
    return trlx.train(
        samples=[[walk[:1], walk[1:]] for walk in walks],
        rewards=metric_fn(walks)["optimality"],
        eval_prompts=eval_prompts * 10,
        metric_fn=lambda samples, **kwargs: metric_fn(samples),
        config=config,
        stop_sequences=["|"],
    )


if __name__ == "__main__":
    main(from_command_line())
