"""What scripts for other releases of TRL import: old paths lead to `trl`, and names without a counterpart say so.

from trl.trainer.utils import DataCollatorForCompletionOnlyLM       # found: the path leads to `trl`
from trl.experimental.cpo import CPOTrainer                         # found
from trl import DDPOTrainer                                         # ImportError: … what to do
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PATHS = (
    "trl.chat_template_utils",
    "trl.commands",
    "trl.data_utils",
    "trl.environment",
    "trl.experimental",
    "trl.extras",
    "trl.import_utils",
    "trl.scripts",
    "trl.trainer",
)
"""Packages of other releases. A name imported from one of them, or from below, is that name of `trl`."""

OBJECTIVE = "an algorithm of your own is a class with `advantages` and `loss`: see examples/own_algorithm.py."
REPORT = "completions go to `log_completions`, and every run writes a report with samples: see `trl report`."
BY_REWARD = "`OnlineDPOTrainer` chooses pairs by reward functions; a judge is one that returns 1 and 0."
SIX_LINES = "it is a `transformers.TrainerCallback` of a few lines; `SyncRefModelCallback` is here."

NOT_HERE = {
    "AlignPropTrainer": "diffusion models are not covered yet.",
    "AllTrueJudge": BY_REWARD,
    "BCOTrainer": 'use `KTOTrainer` with `KTOConfig(loss_type="bco")`.',
    "BEMACallback": SIX_LINES,
    "BaseJudge": BY_REWARD,
    "BasePairwiseJudge": BY_REWARD,
    "BestOfNSampler": "sample with `LocalEngine` and `n=…`, and keep the best of each group.",
    "ConstantLengthDataset": "use `SFTConfig(packing=True)`, or `pack_dataset`.",
    "DDPOTrainer": "diffusion models are not covered yet.",
    "DistillationTrainer": OBJECTIVE,
    "GKDTrainer": OBJECTIVE,
    "GMPOTrainer": 'use `GRPOTrainer` with `GRPOConfig(loss_type="gmpo")`.',
    "HfPairwiseJudge": BY_REWARD,
    "IterativeSFTTrainer": "train an `SFTTrainer` on each round's rows.",
    "LogCompletionsCallback": REPORT,
    "MergeModelCallback": SIX_LINES,
    "NashMDTrainer": "use `OnlineDPOTrainer`.",
    "OpenAIPairwiseJudge": BY_REWARD,
    "PPOv2Trainer": "use `PPOTrainer`: it has the whole loop, `train()`.",
    "PRMTrainer": "use `RewardTrainer` with rows of `prompt`, `completions`, `labels`.",
    "PairRMJudge": BY_REWARD,
    "TextEnvironment": "tools are not called yet; `PPOTrainer.step` learns from what your own loop produced.",
    "TextHistory": "tools are not called yet; `PPOTrainer.step` learns from what your own loop produced.",
    "WeaveCallback": REPORT,
    "WinRateCallback": REPORT,
    "XPOTrainer": "use `OnlineDPOTrainer`.",
    "add_response_schema": "tools are not called yet.",
    "get_training_chat_template": "`assistant_only_loss=True` works with any template: none has to be patched.",
    "init_zero_verbose": "set the level of Python's `logging`.",
    "is_npu_available": "import it from `transformers.utils`.",
    "is_xpu_available": "import it from `accelerate.utils`.",
    "prepare_multimodal_messages": "vision-language models are not covered yet.",
    "setup_chat_format": "use `clone_chat_template`, or `chat_template_path` of the configuration.",
    "supports_tool_calling": "tools are not called yet.",
    "truncate_dataset": "set `max_length` of the configuration: what was cut is counted and said.",
}
NOT_HERE |= {name.replace("Trainer", "Config"): remedy for name, remedy in NOT_HERE.items() if name.endswith("Trainer")}
"""Names that other releases have, and what to do without each."""


def refuse(name: str) -> None:
    """Raises ImportError for a name that exists in other releases alone: `from trl import …` shows its words."""
    if name in NOT_HERE:
        raise ImportError(f"trl.{name} is of another release of TRL and not in this one: {NOT_HERE[name]}")


class OldPaths(MetaPathFinder, Loader):
    """Finds the modules of `PATHS`, which have no files: their names are those of `trl`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = any(fullname == old or fullname.startswith(f"{old}.") for old in PATHS)
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "An import path of other releases. See `trl`."
        module.__dict__["__getattr__"] = name_of_trl


def name_of_trl(name: str) -> Any:
    """A package's `__getattr__` that finds names in `trl`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("trl"), name)
