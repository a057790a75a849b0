"""ILQL on dialogues: chosen answers have reward 1, rejected ones −1."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, from_command_line
from stand_ins import dialogues, overlap, review_model

import trlx
from trlx.data.default_configs import default_ilql_config

LOCAL = {
    "train": {"seq_length": 96, "batch_size": 8, "total_steps": 32, "eval_interval": 16},
    "train.checkpoint_dir": "ckpts/ilql-hh",
    "method.gen_kwargs": {"max_new_tokens": 16, "beta": [1, 4]},
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_ilql_config(), LOCAL, hparams, model=review_model())
    rows = dialogues()
    prompts = [{"prompt": prompt, "chosen": chosen} for prompt, chosen, _ in rows[:8]]
    return trlx.train(
        samples=[[prompt, answer] for prompt, *answers in rows for answer in answers],
        rewards=[reward for _ in rows for reward in (1.0, -1.0)],
        eval_prompts=prompts,
        metric_fn=lambda outputs, chosen, **kwargs: {"overlap": overlap(outputs, chosen)},
        config=config,
        stop_sequences=["Human:", "Assistant:"],
    )


if __name__ == "__main__":
    main(from_command_line())
