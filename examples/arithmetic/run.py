"""Fine-tune on noisy arithmetic, then learn the right answers from a verifier by GRPO: `python run.py --seed 0`."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from problems import LONGEST, accuracy, is_right, make_model, make_tokenizer, noisy_rows, question_rows
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback

from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "html_report": False}


class Curve(TrainerCallback):
    """Prints the reward of each logged step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            print(f"step {state.global_step:4}   {logs['reward']:.3f} {'█' * round(40 * logs['reward'])}", flush=True)


def imitate(*, seed: int = 0) -> LlamaForCausalLM:
    """Make a model, and fine-tune it on the noisy examples."""
    torch.manual_seed(seed)
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            num_train_epochs=6,
            per_device_train_batch_size=100,
            seed=seed,
            **QUIET,
        )
        trainer = SFTTrainer(model, args, train_dataset=noisy_rows(seed=seed), processing_class=make_tokenizer())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def learn(model: LlamaForCausalLM, *, seed: int = 0) -> None:
    """Train `model` in place by GRPO, with eight answers per question."""
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=800,
            num_generations=8,
            scale_rewards="mean",  # questions that are seldom answered well count more: arXiv:2602.02710
            max_completion_length=LONGEST,
            max_steps=260,
            logging_steps=20,
            seed=seed,
            **QUIET,
        )
        trainer = GRPOTrainer(
            model, is_right, args, question_rows(), processing_class=make_tokenizer(), callbacks=[Curve()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    model = imitate(seed=seed)
    print(f"after imitation: {accuracy(model):.3f} of the answers are right")
    learn(model, seed=seed)
    print(f"after GRPO: {accuracy(model):.3f}")


if __name__ == "__main__":
    main()
