"""The training steps of the demo: their data, trainers and hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification, set_seed

from trl.callbacks.progress import bars_of
from trl.demo.model import make_model, train_tokenizer
from trl.demo.options import DemoArguments
from trl.demo.preferences import annotate
from trl.models.load import count_parameters, load_model, load_processor
from trl.rewards.classifier import ClassifierReward
from trl.rewards.model import RewardModel
from trl.trainers.ppo.config import PPOConfig
from trl.trainers.ppo.trainer import PPOTrainer
from trl.trainers.reward import RewardConfig, RewardTrainer
from trl.trainers.sft import SFTConfig, SFTTrainer

STAGES = ("sft", "reward", "ppo")
"""Folder names of the steps."""

SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_train_batch_size": 16}
SMALL = {
    # From random weights; the highest learning rate that trains this model without loss spikes.
    "sft": {"learning_rate": 4e-3, "num_train_epochs": 3, "adam_beta2": 0.98, "weight_decay": 0.0},
    "reward": {"learning_rate": 1e-3, "max_steps": 450, "per_device_train_batch_size": 8},
    # These settings keep the endings diverse. The clipped reward saturates, so that all sufficiently positive reviews
    # earn the same; the KL penalty starts strong, so that no single safe sentence takes over before others are learned;
    # each rollout is used for one epoch, since a second would fit its noise; wide value clipping lets values follow
    # rising rewards; the learning rate falls to 0, since whitened advantages are noise once most samples earn the same.
    "ppo": {
        "learning_rate": 3e-4,
        "max_steps": 58,
        "batch_size": 128,
        "mini_batch_size": 64,
        "ppo_epochs": 1,
        "score_clip": 2.0,
        "init_kl_coef": 1.0,
        "target": 1.8,
        "horizon": 256,
        "lam": 0.9,
        "cliprange_value": 10.0,
        "temperature": 0.5,
    },
}
"""Hyperparameters for the small model that the demo trains from scratch."""
REAL = {
    "sft": {"learning_rate": 5e-5, "num_train_epochs": 1},
    "reward": {"learning_rate": 2e-5, "max_steps": 100, "per_device_train_batch_size": 16},
    "ppo": {
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "max_steps": 240,
        "batch_size": 64,
        "mini_batch_size": 32,
        "ppo_epochs": 2,
        "init_kl_coef": 0.3,
        "target": 4,
        "horizon": 400,
        "temperature": 0.7,
    },
}
"""Hyperparameters for a pretrained model."""

VALUE_RATE = 1e-3
"""Initial learning rate of the value model."""

VALUE_FIRST = 0.08
"""Share of PPO's steps that train only the value model. It starts as a copy of the reward model, whose scores of
unfinished reviews are poor values."""

PAIRS = 3
"""Approximate number of preference pairs per opening."""

LEAST = 4
"""Minimum number of openings to make preference pairs from."""

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def load(name: str | None, texts: Sequence[str]) -> tuple[Any, Any]:
    """Load a model and its tokenizer by name; without one, make a small model and train a tokenizer on the texts."""
    if name is None:
        tokenizer = train_tokenizer(texts)
        return make_model(tokenizer), tokenizer
    model = load_model(name)
    tokenizer = load_processor(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def recipes(options: DemoArguments) -> dict[str, dict[str, Any]]:
    """Hyperparameters of every stage: `SMALL` for the small model, `REAL` for a given one."""
    return SMALL if options.model_name_or_path is None else REAL


def recipe(options: DemoArguments, stage: str) -> dict[str, Any]:
    """The trainer's options for a stage."""
    given = recipes(options)[stage]
    return {
        "output_dir": str(Path(options.output_dir) / stage),
        "save_strategy": "no",
        "logging_steps": 10,
        "logging_first_step": True,
        "seed": options.seed,
        **given,
        **({} if options.max_steps < 0 else {"max_steps": options.max_steps}),
    }


def fine_tune(
    model: Any, tokenizer: Any, train: Dataset, test: Dataset, options: DemoArguments, console: Console
) -> None:
    """Step 1: the model learns to write reviews."""
    console.print(f"{type(model).__name__}, {count_parameters(model)[1] / 1e6:.1f} million parameters", style="dim")
    args = SFTConfig(max_length=128, **{**SCHEDULE, **recipe(options, "sft")})
    trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    with bars_of(trainer, console):
        trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    console.print(f"Loss on {len(test):,} held-out reviews: [bold]{loss:.3f}[/bold] nats per token", highlight=False)
    trainer.save_model()


def learn_rewards(
    model: Any, tokenizer: Any, train: Dataset, test: Dataset, options: DemoArguments, console: Console
) -> RewardModel:
    """Step 2: a classifier on the fine-tuned weights learns which of two reviews an annotator prefers."""
    pairs, held_out = ask_annotator(model, tokenizer, train, test, options)
    told = f"{len(pairs):,} pairs to learn from, {len(held_out):,} held-out ones"
    console.print(told, style="dim", highlight=False)
    set_seed(options.seed)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    args = RewardConfig(center_rewards_coefficient=0.01, mistakes_shown=0, **{**SCHEDULE, **recipe(options, "reward")})
    trainer = RewardTrainer(classifier, args, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer)
    with bars_of(trainer, console):
        trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    console.print(f"Accuracy on held-out pairs: [bold]{accuracy:.1%}[/bold]", highlight=False)
    trainer.save_model()
    return RewardModel(classifier, tokenizer)


def ask_annotator(
    model: Any, tokenizer: Any, train: Dataset, test: Dataset, options: DemoArguments
) -> tuple[Dataset, Dataset]:
    """Make preference pairs: about as many as one epoch of training uses, and a tenth as many from held-out
    openings."""
    given = recipe(options, "reward")
    openings = given["max_steps"] * given["per_device_train_batch_size"] // PAIRS
    counts = zip((train, test), (openings, openings // 10), strict=True)
    reviews = [split.select(range(min(max(count, LEAST), len(split)))) for split, count in counts]
    temperature = recipes(options)["ppo"]["temperature"]
    pairs, held_out = (annotate(model, tokenizer, r, temperature=temperature, seed=options.seed) for r in reviews)
    return pairs, held_out


def examine(classifier: ClassifierReward, test: Dataset, console: Console) -> ClassifierReward:
    """Step 2 with a given classifier: print its accuracy on positive and negative reviews."""
    rewards = classifier([""] * len(test), test["text"])
    right = sum((r > 0) == (label == "positive") for r, label in zip(rewards, test["label"], strict=True))
    console.print(f"Accuracy on held-out reviews: [bold]{right / len(test):.1%}[/bold]", highlight=False)
    return classifier


def reinforce(
    model: Any, tokenizer: Any, reward: Reward, prompts: Sequence[str], options: DemoArguments, console: Console
) -> None:
    """Step 3: train the model with PPO. The value model starts as a copy of the reward model of step 2, if one was
    trained."""

    def sentiment(prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        return reward(prompts, completions)

    set_seed(options.seed)
    args = PPOConfig(
        max_completion_length=64,
        max_grad_norm=1.0,
        log_completions=True,
        num_completions_to_print=0,
        **{**recipe(options, "ppo"), "logging_steps": 4},
    )
    value_model = copy.deepcopy(reward.model) if isinstance(reward, RewardModel) else None
    trainer = PPOTrainer(
        args=args,
        model=model,
        reward_funcs=sentiment,
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer,
        value_model=value_model,
        optimizers=(None, None) if value_model is None else value_first(model, value_model, args),
    )
    with bars_of(trainer, console):
        trainer.train()
    trainer.save_pretrained(args.output_dir)


def value_first(model: nn.Module, value_model: nn.Module, args: PPOConfig) -> tuple[AdamW, LambdaLR]:
    """An optimizer and schedule that train only the value model first, with its own learning rate; both rates fall to
    0."""
    steps, alone = args.max_steps, int(VALUE_FIRST * args.max_steps)
    groups = [
        {"params": list(model.parameters()), "lr": args.learning_rate},
        {"params": list(value_model.parameters()), "lr": VALUE_RATE},
    ]
    optimizer = AdamW(groups, weight_decay=0.0)

    def falling(step: int) -> float:
        return min(1.0, (steps - step) / (steps - alone))

    return optimizer, LambdaLR(optimizer, [lambda step: falling(step) if step >= alone else 0.0, falling])


def continuations(prompts: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The part of each text after its prompt."""
    return [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]
