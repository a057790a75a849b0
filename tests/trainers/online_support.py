"""What tests of online trainers share: prompts, rewards, and an engine whose samples do not depend on the model."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset

from tests.conftest import make_tokenizer
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine
from trl.trainers.grpo import GRPOConfig, GRPOTrainer


def prompts(count: int = 8, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": [f"Say {'please ' * (i % 3)}{i}: " for i in range(count)], **columns})


def letters(completions, **_):
    """The share of the letter a."""
    return [text.count("a") / max(1, len(text)) for text in completions]


def of_length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


class Table(RolloutEngine):
    """An engine whose samples are a function of the prompt and their number, whatever the model."""

    def __init__(self, longest: int = 7) -> None:
        self.longest = longest
        self.calls: list[tuple[int, int]] = []
        self.params = None

    def sync(self, model, step):
        pass

    def generate(self, prompts, params, n):
        self.calls.append((len(prompts), n))
        self.params = params
        return [[self._rollout(prompt.ids, i) for i in range(n)] for prompt in prompts]

    def _rollout(self, ids, i):
        numbers = random.Random(sum(ids) * 31 + i)
        length = numbers.randint(1, self.longest)
        tokens = tuple(numbers.randint(6, 90) for _ in range(length))
        return Rollout(tokens, (-4.5,) * length, "length" if length == self.longest else "stop")


def config(tmp_path, cls=GRPOConfig, **options):
    given = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
    }
    return cls(**{**given, **options})


def make_trainer(
    model,
    tmp_path,
    reward=of_length,
    rows=None,
    *,
    cls=GRPOTrainer,
    engine=None,
    peft=None,
    judge=None,
    rollout_func=None,
    **options,
):
    return cls(
        model=model,
        reward_funcs=reward,
        args=config(tmp_path, cls.config_class, **options),
        train_dataset=prompts() if rows is None else rows,
        processing_class=make_tokenizer(),
        peft_config=peft,
        **{
            name: value
            for name, value in {"engine": engine, "judge": judge, "rollout_func": rollout_func}.items()
            if value is not None
        },
    )


def even_prompts(prompts, completion_ids, **_):
    """Groups of even prompts have rewards that differ."""
    return [len(ids) * (int(p.split()[-1][0]) % 2 == 0) for p, ids in zip(prompts, completion_ids, strict=True)]


def encoded(count):
    tokenizer = make_tokenizer()
    return [Prompt(tokenizer(row["prompt"])["input_ids"]) for row in prompts(count)]


def gradient(model, tmp_path, **options):
    """(loss, gradients) of one step: with plain SGD at rate 1, what the step took away."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    trainer = make_trainer(model, tmp_path, engine=Table(), **{**sgd, "shuffle_dataset": False, **options})
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    return loss, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    for name, value in expected[1].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-5, atol=2e-5 * scale + 1e-7, msg=lambda m, n=name: n + m
        )
