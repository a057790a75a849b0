"""Calls that type checkers have to take, and calls that they have to refuse: read by `make lint`, never run.

A comment that ignores an error which is not there is an error itself, so that every wrong call below is known to be found.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset

import trl
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOTrainer,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)


def length(completions: Sequence[str], **_: object) -> list[float]:
    return [float(len(completion)) for completion in completions]


def right(rows: Dataset) -> None:
    """Every trainer as its documentation calls it, by place and by keyword, and with options of classic scripts."""
    args = SFTConfig("out", learning_rate=1e-5, max_length=None, packing=True)
    width: int | None = args.max_length
    SFTTrainer("gpt2", args, train_dataset=rows, eval_dataset={"own": rows}, peft_config=None, callbacks=[]).train()
    SFTTrainer("gpt2", train_dataset=rows, dataset_text_field="text", max_seq_length=width)
    DPOTrainer("gpt2", None, DPOConfig(beta=0.2), train_dataset=rows, tokenizer=None)
    KTOTrainer(model="gpt2", train_dataset=rows, optimizers=(None, None))
    RewardTrainer("gpt2", RewardConfig(max_length=64), train_dataset=rows)
    GRPOTrainer("gpt2", length, GRPOConfig(num_generations=4), rows, engine=None)
    RLOOTrainer("gpt2", reward_funcs=[length], train_dataset=rows)
    OnlineDPOTrainer("gpt2", judge=lambda prompts, completions: [0 for _ in prompts], train_dataset=rows)
    PPOTrainer(PPOConfig(batch_size=4), "gpt2", None, num_shared_layers=2)
    PPOTrainer(args=PPOConfig(), model="gpt2", reward_funcs=length, train_dataset=rows).train()


def misspelt(rows: Dataset) -> None:
    """Names that are nowhere, of a configuration and of a trainer."""
    SFTConfig(learning_rte=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    DPOConfig(betta=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    GRPOConfig(num_generation=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    PPOConfig(ppo_epoch=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    SFTTrainer("gpt2", train_datset=rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    DPOTrainer("gpt2", train_datset=rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    KTOTrainer("gpt2", train_datset=rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RewardTrainer("gpt2", train_datset=rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    GRPOTrainer("gpt2", length, train_datset=rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RLOOTrainer("gpt2", length, train_datset=rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    OnlineDPOTrainer("gpt2", length, train_datset=rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    PPOTrainer(PPOConfig(), "gpt2", train_datset=rows)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def unknown() -> None:
    """A public name that is not there, and one of a configuration."""
    trl.SFTTrianer  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
    SFTConfig("out").max_lenght  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
