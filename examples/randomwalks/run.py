"""Pre-train on random walks, then learn the shortest ones: `python run.py --method grpo|rloo|ppo`."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PrinterCallback, TrainerCallback
from walks import LONGEST, make_model, make_tokenizer, mean_optimality, near_shortest, start_rows, walk_rows

from trl import RolloutEngine, SFTConfig, SFTTrainer
from trl.trainers.grpo import GRPOConfig, GRPOTrainer
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer
from trl.trainers.rloo import RLOOConfig, RLOOTrainer

METHODS = {
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        {"per_device_train_batch_size": 160, "num_generations": 8, "max_steps": 48, "logging_steps": 4}
        | {"lr_scheduler_type": "constant"},
    ),
    "rloo": (
        RLOOTrainer,
        RLOOConfig,
        {"per_device_train_batch_size": 160, "num_generations": 8, "beta": 0.0, "max_steps": 64, "logging_steps": 4}
        | {"lr_scheduler_type": "constant"},
    ),
    "ppo": (
        PPOTrainer,
        PPOConfig,
        {"batch_size": 160, "mini_batch_size": 80, "ppo_epochs": 2, "init_kl_coef": 0.01, "max_steps": 160}
        | {"logging_steps": 8, "lr_scheduler_type": "linear"},
    ),
}
"""Trainer, its configuration class, and options. A rollout batch has 8 walks from each of the 20 starts."""

QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}


class Curve(TrainerCallback):
    """Reward function that counts sampled tokens, and callback that prints the reward of each logged step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.rewards: list[float] = []

    def reward(self, prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        return near_shortest(prompts, completion_ids)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            self.rewards.append(logs["reward"])
            bar = "█" * round(40 * logs["reward"])
            print(
                f"step {state.global_step:4}   {self.tokens:6} tokens sampled   {logs['reward']:.3f} {bar}", flush=True
            )


def pretrain(*, seed: int = 0) -> GPT2LMHeadModel:
    """Make a model, and fine-tune it on random walks along the edges."""
    torch.manual_seed(seed)
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            num_train_epochs=8,
            per_device_train_batch_size=50,
            seed=seed,
            **QUIET,
        )
        trainer = SFTTrainer(model, args, train_dataset=walk_rows(), processing_class=make_tokenizer())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def learn(model: GPT2LMHeadModel, method: str, *, seed: int = 0, engine: RolloutEngine | None = None) -> Curve:
    """Train `model` in place towards short walks, on samples of `engine`, by default of the model in process."""
    trainer_class, config_class, options = METHODS[method]
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            learning_rate=5e-4,
            max_completion_length=LONGEST - 1,
            seed=seed,
            **options,
            **QUIET,
        )
        trainer = trainer_class(
            args=args,
            model=model,
            reward_funcs=curve.reward,
            train_dataset=start_rows(copies=8),
            processing_class=make_tokenizer(),
            callbacks=[curve],
            engine=engine,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="grpo")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = pretrain(seed=given.seed)
    print(f"pre-trained on random walks: mean optimality {mean_optimality(model):.3f}")
    learn(model, given.method, seed=given.seed)
    print(f"after {given.method}: mean optimality {mean_optimality(model):.3f}")


if __name__ == "__main__":
    main()
