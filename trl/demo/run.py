"""`trl demo`: the three steps of learning from human feedback, on the shipped film reviews.

1. supervised fine-tuning    a model learns to write reviews, good and bad ones
2. reward model              a classifier learns which of two reviews is the positive one
3. PPO                       the model learns to write positive ones, and not to stray from what it wrote before

trl demo                                  a GPT-2 of 1.4 million parameters, made and trained on the spot
trl demo --model_name_or_path gpt2        a real model
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)

from trl.demo.model import make_model, train_tokenizer
from trl.demo.reviews import load_reviews
from trl.demo.sample import prompt_openings, sample
from trl.demo.show import Step, judge, quiet, share_grammatical, table_of_samples
from trl.models.load import count_parameters, load_model, load_processor
from trl.rewards.model import RewardModel
from trl.trainers.ppo import PPOTrainer
from trl.trainers.ppo_config import PPOConfig
from trl.trainers.progress import RichProgressCallback
from trl.trainers.reward import RewardConfig, RewardTrainer
from trl.trainers.sft import SFTConfig, SFTTrainer

SMALL = {"learning_rate": 4e-3, "num_train_epochs": 2, "adam_beta2": 0.98, "weight_decay": 0.0}
"""From random weights: the highest rate that trains this model without a spike."""
REAL = {"learning_rate": 5e-5, "num_train_epochs": 1}
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_train_batch_size": 16}
SIDES = {"chosen": "positive", "rejected": "negative"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = read_options(argv)
    with quiet():
        show(options, Console())
    return 0


def show(options: argparse.Namespace, console: Console) -> None:
    """The three steps, one after the other."""
    set_seed(options.seed)
    train, test = load_reviews("train"), load_reviews("test")
    prompts = prompt_openings(test.select(range(options.judged)))

    with Step(console, 1, "Supervised fine-tuning", f"{len(train):,} film reviews, positive and negative ones"):
        model, tokenizer = load(options.model_name_or_path, train["text"])
        untrained = sample(model, tokenizer, prompts[: options.samples], seed=options.seed)
        fine_tune(model, tokenizer, train, test, options, console)
    before = sample(model, tokenizer, prompts, seed=options.seed)
    console.print(table_of_samples(prompts, {"untrained": untrained, "fine-tuned": before}, rows=options.samples))

    with Step(console, 2, "Reward model", "pairs of a positive and a negative review; the positive one is chosen"):
        reward = learn_rewards(model, tokenizer, train, test, options, console)

    with Step(console, 3, "PPO", "towards reviews that the reward model likes, near the model of step 1"):
        reinforce(model, tokenizer, reward, prompt_openings(train), options, console)
    after = sample(model, tokenizer, prompts, seed=options.seed)
    console.print(table_of_samples(prompts, {"before PPO": before, "after PPO": after}, rows=options.samples))
    console.print(
        f"Positive reviews, of {len(prompts)} samples: {judge(reward, prompts, before):.0%} before, "
        f"[bold]{judge(reward, prompts, after):.0%}[/bold] after. Grammatical throughout: "
        f"{share_grammatical(before):.0%} before, {share_grammatical(after):.0%} after.\n"
        f"The report is in {Path(options.output_dir) / 'ppo' / 'report.html'}, the models are beside it.",
        highlight=False,
    )


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trl demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="a causal language model; default: one made on the spot")
    parser.add_argument("--output_dir", default="trl-demo", help="where models and report go; default: %(default)s")
    parser.add_argument("--max_steps", type=int, default=-1, help="optimizer steps of each stage at most")
    parser.add_argument("--samples", type=int, default=3, help="samples to show; default: %(default)s")
    parser.add_argument("--judged", type=int, default=200, help="samples to judge; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(argv)


def load(name: str | None, texts: Sequence[str]) -> tuple[Any, Any]:
    """A model and its tokenizer: by name, or made from a configuration and trained on the texts."""
    if name is None:
        tokenizer = train_tokenizer(texts)
        return make_model(tokenizer), tokenizer
    model = load_model(name)
    tokenizer = load_processor(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def run(trainer: Any, console: Console) -> None:
    """Train with one bar of progress."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RichProgressCallback(console))
    trainer.train()


def common(options: argparse.Namespace, stage: str) -> dict[str, Any]:
    return {
        "output_dir": str(Path(options.output_dir) / stage),
        "save_strategy": "no",
        "logging_steps": 10,
        "logging_first_step": True,
        "seed": options.seed,
        "max_steps": options.max_steps,
    }


def fine_tune(
    model: Any, tokenizer: Any, train: Dataset, test: Dataset, options: argparse.Namespace, console: Console
) -> None:
    """Step 1: the model learns to write reviews."""
    console.print(f"{type(model).__name__}, {count_parameters(model)[1] / 1e6:.1f} million parameters", style="dim")
    recipe = SMALL if options.model_name_or_path is None else REAL
    args = SFTConfig(max_length=128, **SCHEDULE, **recipe, **common(options, "sft"))
    trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    run(trainer, console)
    loss = trainer.evaluate()["eval_loss"]
    console.print(f"Loss on {len(test):,} held-out reviews: [bold]{loss:.3f}[/bold] nats per token", highlight=False)
    trainer.save_model()


def learn_rewards(
    model: Any, tokenizer: Any, train: Dataset, test: Dataset, options: argparse.Namespace, console: Console
) -> RewardModel:
    """Step 2: a classifier on the fine-tuned weights learns to tell positive from negative reviews."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    given = common(options, "reward")
    steps = 100 if options.max_steps < 0 else options.max_steps
    rate = 1e-3 if options.model_name_or_path is None else 2e-5
    args = RewardConfig(
        learning_rate=rate,
        center_rewards_coefficient=0.01,
        mistakes_shown=0,
        **SCHEDULE,
        **{**given, "max_steps": steps},
    )
    trainer = RewardTrainer(
        classifier, args, train_dataset=opposites(train), eval_dataset=opposites(test), processing_class=tokenizer
    )
    run(trainer, console)
    accuracy = trainer.evaluate()["eval_accuracy"]
    console.print(f"Accuracy on held-out pairs: [bold]{accuracy:.1%}[/bold]", highlight=False)
    trainer.save_model()
    return RewardModel(classifier, tokenizer)


def opposites(reviews: Dataset) -> Dataset:
    """Pairs of a positive and a negative review."""
    sides = {side: [row["text"] for row in reviews if row["label"] == label] for side, label in SIDES.items()}
    return Dataset.from_dict(sides)


def reinforce(
    model: Any,
    tokenizer: Any,
    reward: RewardModel,
    prompts: Sequence[str],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Step 3: the model learns to write what is rewarded; the KL penalty keeps it near what it was."""
    given = common(options, "ppo")
    args = PPOConfig(
        learning_rate=3e-4 if options.model_name_or_path is None else 1.41e-5,
        lr_scheduler_type="constant",
        batch_size=64,
        mini_batch_size=32,
        ppo_epochs=2,
        init_kl_coef=0.1,
        target=6,
        horizon=1000,
        max_completion_length=64,
        temperature=0.7,
        max_grad_norm=1.0,
        **{**given, "max_steps": 80 if options.max_steps < 0 else options.max_steps, "logging_steps": 4},
    )
    rows = Dataset.from_dict({"prompt": list(prompts)})
    trainer = PPOTrainer(args=args, model=model, reward_funcs=reward, train_dataset=rows, processing_class=tokenizer)
    run(trainer, console)
    trainer.save_pretrained(given["output_dir"])
