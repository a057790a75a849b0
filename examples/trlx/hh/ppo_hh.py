"""PPO of dialogues, rewarded by how much of the chosen answer is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import dialogues, overlap, review_model

import trlx
from trlx.data.default_configs import TRLConfig, default_ppo_config

LOCAL = {
    "train": {"seq_length": 96, "batch_size": 8, "total_steps": 32, "eval_interval": 16, "tracker": None},
    "train.checkpoint_dir": "ckpts/ppo-hh",
    "tokenizer.truncation_side": "left",
    "model.num_layers_unfrozen": 1,
    "method": {"num_rollouts": 16, "chunk_size": 16},
    "method.gen_kwargs": {"max_new_tokens": 16, "top_p": 1.0},
}


def main(hparams: dict | None = None) -> object:
    name = review_model()
    named = {"model.model_path": name, "tokenizer.tokenizer_path": name}
    config = TRLConfig.update(TRLConfig.update(default_ppo_config(), {**LOCAL, **named}), hparams or {})
    prompts = [{"prompt": prompt, "chosen": chosen} for prompt, chosen, _ in dialogues()]

    def reward_fn(outputs: list[str], chosen: list[str], **kwargs: object) -> list[float]:
        return overlap(outputs, chosen)

    return trlx.train(
        reward_fn=reward_fn,
        prompts=prompts,
        eval_prompts=prompts[:8],
        config=config,
        stop_sequences=["Human:", "Assistant:"],
    )


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
