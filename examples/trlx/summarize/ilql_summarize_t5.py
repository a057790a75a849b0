"""ILQL of an encoder-decoder: summaries of people are rewarded, the beginnings of posts are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import encoder_decoder, overlap, posts

import trlx
from trlx.data.default_configs import TRLConfig, default_ilql_config

LOCAL = {
    "train": {"seq_length": 512, "batch_size": 8, "total_steps": 32, "eval_interval": 16, "tracker": None},
    "train.checkpoint_dir": "ckpts/ilql-summarize",
    "model.model_arch_type": "seq2seq",
    "method.gen_kwargs": {"max_new_tokens": 16, "beta": [0, 4]},
}


def main(hparams: dict | None = None) -> object:
    name = encoder_decoder()
    named = {"model.model_path": name, "tokenizer.tokenizer_path": name}
    config = TRLConfig.update(TRLConfig.update(default_ilql_config(), {**LOCAL, **named}), hparams or {})
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
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
