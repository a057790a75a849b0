"""Fine-tuning on chosen answers."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from settings import configuration, from_command_line
from stand_ins import dialogues, overlap, review_model

import trlx
from trlx.data.default_configs import default_sft_config

LOCAL = {
    "train": {"seq_length": 96, "batch_size": 8, "total_steps": 32, "eval_interval": 16},
    "train.checkpoint_dir": "ckpts/sft-hh",
    "method.gen_kwargs": {"max_new_tokens": 16, "top_k": 20},
}


def main(hparams: dict | None = None) -> object:
    config = configuration(default_sft_config(), LOCAL, hparams, model=review_model())
    rows = dialogues()
    return trlx.train(
        samples=[[prompt, chosen] for prompt, chosen, _ in rows],
        eval_prompts=[{"prompt": prompt, "chosen": chosen} for prompt, chosen, _ in rows[:8]],
        metric_fn=lambda outputs, chosen, **kwargs: {"overlap": overlap(outputs, chosen)},
        config=config,
        stop_sequences=["Human:", "Assistant:"],
    )


if __name__ == "__main__":
    main(from_command_line())
