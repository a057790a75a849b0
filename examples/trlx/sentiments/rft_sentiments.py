"""Rejection-sampling fine-tuning towards positive reviews."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import review_model, reviews, sentiment

import trlx
from trlx.data.default_configs import TRLConfig, default_ppo_config
from trlx.trainer.accelerate_rft_trainer import RFTConfig

LOCAL = {
    "train": {"seq_length": 48, "batch_size": 16, "total_steps": 60, "eval_interval": 20, "tracker": None},
    "train.checkpoint_dir": "ckpts/rft-sentiments",
    "train.trainer": "AccelerateRFTTrainer",
    "model.num_layers_unfrozen": -1,
    "optimizer.kwargs.lr": 3e-4,
    "scheduler.kwargs.eta_min": 3e-4,
}


def main(hparams: dict | None = None) -> object:
    name = review_model()
    named = {"model.model_path": name, "tokenizer.tokenizer_path": name}
    method = RFTConfig(n_generations_per_prompt=8, gen_kwargs={"max_new_tokens": 24, "do_sample": True})
    default = TRLConfig.from_dict({**default_ppo_config().to_dict(), "method": method.to_dict()})
    config = TRLConfig.update(TRLConfig.update(default, {**LOCAL, **named}), hparams or {})
    texts, _ = reviews()
    prompts = [" ".join(text.split()[:4]) for text in texts[:32]]
    positive = sentiment()
    return trlx.train(
        reward_fn=lambda samples, **kwargs: positive(samples), prompts=prompts, eval_prompts=prompts, config=config
    )


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
