"""What is measured: each workload names a trainer, its rows, its options and the ratios it is held to.

To add a trainer, add a `Workload`; `worker.py` and `run.py` need no change as long as the trainer is built as
`Trainer(model=, args=Config(...), train_dataset=, processing_class=, **arguments())` on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import synthetic

WARMUP = 2
"""Optimizer steps before the clock starts."""

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
"""Options that every side of every workload gets: float32, the same order of rows, the same optimizer."""


@dataclass(frozen=True)
class Target:
    """The largest ratio of ours to theirs that meets the aim; None: shown, not judged."""

    time: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Workload:
    """One trainer on one kind of rows.

    rows           `rows(count, seed=)` makes them
    rows_per_step  rows that one optimizer step uses up (for packing: at least as many)
    config         fields of the trainer's config, over `COMMON`
    targets        the sides that we are compared with ("trl", "transformers") and what the comparison should give
    same_batches   whether a step holds the same tokens on every side. Where it does, losses are compared step for step
    per_token      whether time is compared per token that is not padding, for steps of different size (packing)
    material       which saved model is trained
    arguments      makes further keyword arguments of the trainer (reward functions, …)
    """

    name: str
    about: str
    trainer: str
    config_class: str
    rows: Callable[..., list[synthetic.Row]]
    rows_per_step: int
    config: Mapping[str, Any]
    targets: Mapping[str, Target]
    same_batches: bool = True
    per_token: bool = False
    material: str = "policy"
    arguments: Callable[[], dict[str, Any]] = field(default=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        return ("ours", *self.targets)

    def rows_path(self, directory: Path) -> Path:
        return directory / f"{self.name}.jsonl"

    def write_rows(self, directory: Path, *, steps: int, seed: int, warmup: int = WARMUP) -> None:
        """One JSON object a line: enough rows for the warm-up, `steps` timed steps and one more."""
        rows = self.rows(self.rows_per_step * (warmup + steps + 1), seed=seed)
        self.rows_path(directory).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read_rows(self, directory: Path) -> list[synthetic.Row]:
        return [json.loads(line) for line in self.rows_path(directory).read_text().splitlines()]


_sft = partial(Workload, trainer="SFTTrainer", config_class="SFTConfig")
_dpo = partial(Workload, trainer="DPOTrainer", config_class="DPOConfig")
_kto = partial(
    Workload,
    trainer="KTOTrainer",
    config_class="KTOConfig",
    rows_per_step=8,
    config={"per_device_train_batch_size": 8, "max_length": 1024, "beta": 0.1},
    targets={"trl": Target(time=0.7, memory=1.0)},
)


def remainder(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing and differs within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


_grpo = partial(
    Workload,
    trainer="GRPOTrainer",
    config_class="GRPOConfig",
    rows_per_step=8,
    same_batches=False,
    material="sampler",
    arguments=lambda: {"reward_funcs": remainder},
)

ROUND = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 1e-6,
    "shuffle_dataset": False,
    "train_sampling_strategy": "random",  # of no effect on prompts; ours takes no other
}
"""Online: 8 prompts × 8 completions, in 8 micro-batches of one optimizer step. At this rate, lengths stay as they are."""

_ALL = [
    _sft(
        name="sft-padded",
        about="chats, 8 a step, at most 512 tokens, every token trained",
        rows=synthetic.chat_rows,
        rows_per_step=8,
        config={"per_device_train_batch_size": 8, "max_length": 512},
        targets={"trl": Target(time=0.6, memory=0.6), "transformers": Target(time=1.0)},
    ),
    _sft(
        name="sft-packed",
        about="chats packed best-fit-decreasing into rows of 1,024 tokens, 4 a step",
        rows=synthetic.chat_rows,
        rows_per_step=32,
        config={
            "per_device_train_batch_size": 4,
            "max_length": 1024,
            "packing": True,
            "packing_strategy": "bfd",
        },
        targets={"trl": Target(time=0.7, memory=0.6)},
        same_batches=False,
        per_token=True,
    ),
    _sft(
        name="sft-packed-512",
        about="the same chats in rows of 512 tokens, 8 a step",
        rows=synthetic.chat_rows,
        rows_per_step=32,
        config={"per_device_train_batch_size": 8, "max_length": 512, "packing": True, "packing_strategy": "bfd"},
        targets={"trl": Target(time=0.7, memory=0.6)},
        same_batches=False,
        per_token=True,
    ),
    _sft(
        name="sft-long-prompt",
        about="prompts of 400 to 800 tokens, completions of 40 to 80, 8 a step, completions trained",
        rows=synthetic.completion_rows,
        rows_per_step=8,
        config={"per_device_train_batch_size": 8, "max_length": 1024, "completion_only_loss": True},
        targets={"trl": Target(time=0.35, memory=0.6)},
    ),
    Workload(
        name="reward",
        about="pairs on prompts of 20 to 60 tokens, completions of 60 to 100, 8 pairs a step",
        trainer="RewardTrainer",
        config_class="RewardConfig",
        rows=partial(synthetic.preference_rows, prompt=(20, 60)),
        rows_per_step=8,
        config={"per_device_train_batch_size": 8, "max_length": 1024},
        targets={"trl": Target(time=0.7, memory=1.0)},
        material="reward",
    ),
    _dpo(
        name="dpo-long-prompt",
        about="pairs on prompts of 350 to 450 tokens, completions of 60 to 100, 4 pairs a step",
        rows=synthetic.preference_rows,
        rows_per_step=4,
        config={"per_device_train_batch_size": 4, "max_length": 1024, "beta": 0.1},
        targets={"trl": Target(time=0.35, memory=0.6)},
    ),
    _dpo(
        name="dpo-short-prompt",
        about="pairs on prompts of 20 to 60 tokens, completions of 60 to 100, 8 pairs a step",
        rows=partial(synthetic.preference_rows, prompt=(20, 60)),
        rows_per_step=8,
        config={"per_device_train_batch_size": 8, "max_length": 1024, "beta": 0.1},
        targets={"trl": Target(time=0.6, memory=0.6)},
    ),
    _kto(
        name="kto",
        about="labelled completions of 60 to 100 tokens on prompts of 40 to 80, 8 a step",
        rows=synthetic.unpaired_rows,
    ),
    _kto(
        name="kto-long-prompt",
        about="labelled completions of 20 to 60 tokens on prompts of 200 to 300, 8 a step",
        rows=partial(synthetic.unpaired_rows, prompt=(200, 300), completion=(20, 60)),
    ),
    _kto(
        name="kto-long-completion",
        about="labelled completions of 150 to 250 tokens on prompts of 10 to 30, 8 a step",
        rows=partial(synthetic.unpaired_rows, prompt=(10, 30), completion=(150, 250)),
    ),
    _grpo(
        name="grpo-long-prompt",
        about="8 prompts of 400 tokens × 8 completions of at most 64, ended at random, a step",
        rows=partial(synthetic.prompt_rows, prompt=(400, 400)),
        config=ROUND,
        targets={"trl": Target(time=0.4, memory=0.6)},
    ),
    _grpo(
        name="grpo-short-prompt",
        about="8 prompts of 20 to 60 tokens × 8 completions of at most 64, ended at random, a step",
        rows=partial(synthetic.prompt_rows, prompt=(20, 60)),
        config=ROUND,
        targets={"trl": Target(time=0.7)},
    ),
    _grpo(
        name="grpo-two-iterations",
        about="as grpo-long-prompt, every round learned from in two steps",
        rows=partial(synthetic.prompt_rows, prompt=(400, 400)),
        config=ROUND | {"num_iterations": 2},
        targets={"trl": Target(time=0.4, memory=0.6)},
    ),
]

WORKLOADS = {workload.name: workload for workload in _ALL}
