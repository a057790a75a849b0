"""Learn the shortest ways through a graph: pre-train on random walks, then GRPO, or RLOO.

    python examples/randomwalks/grpo.py
    python examples/randomwalks/grpo.py --method rloo

The task, and what optimality is, are in `walks.py`. A minute or two on two CPU cores.
"""

from __future__ import annotations

import argparse

import torch
from walks import make_model, make_tokenizer, mean_optimality, near_shortest, start_rows, walk_rows

from trl.trainers.grpo import GRPOConfig, GRPOTrainer
from trl.trainers.online import OnlineTrainer
from trl.trainers.rloo import RLOOConfig, RLOOTrainer
from trl.trainers.sft import SFTConfig, SFTTrainer

SHARED = {"save_strategy": "no", "report_to": [], "logging_steps": 10}


def pretrain(model: torch.nn.Module, output_dir: str, *, epochs: int = 10) -> None:
    """Teach the model which edges there are."""
    args = SFTConfig(output_dir, **SHARED, num_train_epochs=epochs, per_device_train_batch_size=100, learning_rate=1e-3)
    SFTTrainer(model, args, train_dataset=walk_rows(), processing_class=make_tokenizer()).train()


def reinforce(model: torch.nn.Module, output_dir: str, *, method: str = "grpo", steps: int = 60) -> OnlineTrainer:
    """16 walks from each of the 20 starts a step; those nearer to the shortest become likelier."""
    options = {
        **SHARED,
        "max_steps": steps,
        "per_device_train_batch_size": 320,
        "num_generations": 16,
        "max_completion_length": 9,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "beta": 0.0,
    }
    trainer_class, config_class = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[method]
    args = config_class(output_dir, **options)
    trainer = trainer_class(model, near_shortest, args, train_dataset=start_rows(), processing_class=make_tokenizer())
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of reinforcement")
    parser.add_argument("--output_dir", default="randomwalks")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = make_model()
    pretrain(model, given.output_dir)
    before = mean_optimality(model)
    reinforce(model, given.output_dir, method=given.method, steps=given.steps)
    print(f"Mean optimality: {before:.2f} after pre-training, {mean_optimality(model):.2f} after {given.method}.")


if __name__ == "__main__":
    main()
