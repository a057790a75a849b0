"""ILQL of an encoder-decoder: human summaries have reward 1, beginnings of posts 0."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, from_command_line
from stand_ins import encoder_decoder, overlap, posts

import trlx
from trlx.data.default_configs import default_ilql_config

LOCAL = {
    "train": {"seq_length": 512, "batch_size": 8, "total_steps": 32, "eval_interval": 16},
    "train.checkpoint_dir": "ckpts/ilql-summarize",
    "model.model_arch_type": "seq2seq",
    "method.gen_kwargs": {"max_new_tokens": 16, "beta": [0, 4]},
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_ilql_config(), LOCAL, hparams, model=encoder_decoder())
    rows = posts()
    good = [[post, summary] for post, summary in rows]
    bad = [[post, " ".join(post.split()[:8])] for post, _ in rows]
    return trlx.train(
        samples=[*good, *bad],
        rewards=[1.0] * len(good) + [0.0] * len(bad),
        eval_prompts=[{"prompt": post, "summary": summary} for post, summary in rows[:8]],
        metric_fn=lambda outputs, summary, **kwargs: {"overlap": overlap(outputs, summary)},
        config=config,
    )


if __name__ == "__main__":
    main(from_command_line())
