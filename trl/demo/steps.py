"""The steps of the demo: what is trained in each, on what, and how."""

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
"""Folders of the steps."""

SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_train_batch_size": 16}
SMALL = {
    # From random weights: the highest rate that trains this model without a spike.
    "sft": {"learning_rate": 4e-3, "num_train_epochs": 3, "adam_beta2": 0.98, "weight_decay": 0.0},
    "reward": {"learning_rate": 1e-3, "max_steps": 450, "per_device_train_batch_size": 8},
    # Against endings that become alike: a reward that saturates, so that all that are positive enough are worth the same; a KL
    # penalty that begins strong, so that no one safe sentence takes over before the others have been learned; every rollout
    # used once, since what is noise in it would be learned twice; values that may follow as fast as the rewards rise; a rate
    # that falls to 0, since whitened advantages are noise once most samples earn the same.
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
"""For the model that is made on the spot."""
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
"""For a model that has been trained before."""

VALUE_RATE = 1e-3
"""Learning rate of a value model, at first."""

VALUE_FIRST = 0.08
"""Share of PPO's steps in which a value model learns alone: a reward model says little of reviews that are not finished."""

PAIRS = 3
"""Pairs of an opening's reviews in which the annotator prefers one, about."""

LEAST = 4
"""Openings of which reviews are compared, at least."""

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


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


def recipes(options: DemoArguments) -> dict[str, dict[str, Any]]:
    """Options of every stage, by the size of the model."""
    return SMALL if options.model_name_or_path is None else REAL


def recipe(options: DemoArguments, stage: str) -> dict[str, Any]:
    """Options of a stage's trainer."""
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
    """As many preferences as one pass of training uses, of openings to train on; and a tenth as many, of held-out openings."""
    given = recipe(options, "reward")
    openings = given["max_steps"] * given["per_device_train_batch_size"] // PAIRS
    counts = zip((train, test), (openings, openings // 10), strict=True)
    reviews = [split.select(range(min(max(count, LEAST), len(split)))) for split, count in counts]
    temperature = recipes(options)["ppo"]["temperature"]
    pairs, held_out = (annotate(model, tokenizer, r, temperature=temperature, seed=options.seed) for r in reviews)
    return pairs, held_out


def examine(classifier: ClassifierReward, test: Dataset, console: Console) -> ClassifierReward:
    """Step 2 with a classifier that was named: how well it tells positive from negative reviews."""
    rewards = classifier([""] * len(test), test["text"])
    right = sum((r > 0) == (label == "positive") for r, label in zip(rewards, test["label"], strict=True))
    console.print(f"Accuracy on held-out reviews: [bold]{right / len(test):.1%}[/bold]", highlight=False)
    return classifier


def reinforce(
    model: Any, tokenizer: Any, reward: Reward, prompts: Sequence[str], options: DemoArguments, console: Console
) -> None:
    """Step 3: the model learns to write what is rewarded; the KL penalty keeps it near what it was. Values begin as the reward
    model that was trained in step 2."""

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
    """An optimizer in which the value model learns at a rate of its own, and alone at first; both rates fall to 0."""
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
    """What stands after each prompt."""
    return [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]
