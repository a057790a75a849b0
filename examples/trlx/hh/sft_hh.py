"""Fine-tuning on chosen answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import dialogues, overlap, review_model

import trlx
from trlx.data.default_configs import TRLConfig, default_sft_config

LOCAL = {
    "train": {"seq_length": 96, "batch_size": 8, "total_steps": 32, "eval_interval": 16, "tracker": None},
    "train.checkpoint_dir": "ckpts/sft-hh",
    "method.gen_kwargs": {"max_new_tokens": 16, "top_k": 20},
}


def main(hparams: dict | None = None) -> object:
    name = review_model()
    named = {"model.model_path": name, "tokenizer.tokenizer_path": name}
    config = TRLConfig.update(TRLConfig.update(default_sft_config(), {**LOCAL, **named}), hparams or {})
    rows = dialogues()
    return trlx.train(
        samples=[[prompt, chosen] for prompt, chosen, _ in rows],
        eval_prompts=[{"prompt": prompt, "chosen": chosen} for prompt, chosen, _ in rows[:8]],
        metric_fn=lambda outputs, chosen, **kwargs: {"overlap": overlap(outputs, chosen)},
        config=config,
        stop_sequences=["Human:", "Assistant:"],
    )


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
