"""PPO of an encoder-decoder towards positive endings of reviews."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import encoder_decoder, reviews, sentiment

import trlx
from trlx.data.default_configs import TRLConfig, default_ppo_config

LOCAL = {
    "train": {"seq_length": 48, "batch_size": 16, "total_steps": 40, "eval_interval": 20, "tracker": None},
    "train.checkpoint_dir": "ckpts/ppo-sentiments-t5",
    "model": {"model_arch_type": "seq2seq", "num_layers_unfrozen": -1},
    "optimizer.kwargs.lr": 1e-3,
    "scheduler.kwargs.eta_min": 1e-3,
    "method": {"num_rollouts": 32, "chunk_size": 32, "init_kl_coef": 0.05},
    "method.gen_kwargs.max_new_tokens": 16,
}


def main(hparams: dict | None = None) -> object:
    name = encoder_decoder()
    named = {"model.model_path": name, "tokenizer.tokenizer_path": name}
    config = TRLConfig.update(TRLConfig.update(default_ppo_config(), {**LOCAL, **named}), hparams or {})
    texts, _ = reviews()
    prompts = [" ".join(text.split()[:8]) for text in texts]
    positive = sentiment()
    return trlx.train(
        reward_fn=lambda outputs, **kwargs: positive(outputs), prompts=prompts, eval_prompts=prompts[:16], config=config
    )


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
