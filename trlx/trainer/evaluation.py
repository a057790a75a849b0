"""Evaluation during training: before the first step, every `eval_interval` steps, and at the end."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from trl.rollouts.evaluation import SampledMetrics
from trl.sweep.reporting import report
from trlx.utils import significant

if TYPE_CHECKING:
    from trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer

SHOWN = 8
"""Number of samples in the table that an evaluation prints."""

BEST = "best_checkpoint"


class EvaluationCallback(TrainerCallback):
    """Samples from the evaluation prompts, logs the metrics, and saves the model with the best mean reward."""

    def __init__(self, front: AccelerateRLTrainer) -> None:
        self.front = front
        self.best: float | None = None
        self.last: dict[str, float] = {}
        self.evaluated_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.front.config.train.eval_interval == 0:
            self._evaluate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.evaluated_at != state.global_step:
            self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        if not self.front.eval_rows:
            return
        self.evaluated_at, self.last = step, self.front.evaluate()
        self.front.trainer.log(dict(self.last))
        report(self.last)
        reward = _best_reward(self.last)
        if self.front.config.train.save_best and reward is not None and (self.best is None or reward > self.best):
            self.best = reward
            self.front.save_pretrained(Path(self.front.config.train.checkpoint_dir) / BEST / "hf_model")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Link `checkpoint_0100/hf_model` to the checkpoint `checkpoint-100`, since scripts for trlX look there."""
        if not state.is_world_process_zero:
            return
        digits = len(str(state.max_steps))
        folder = Path(args.output_dir) / f"checkpoint_{state.global_step:0{digits}}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "hf_model").symlink_to(Path("..") / f"checkpoint-{state.global_step}", target_is_directory=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "last": self.last, "evaluated_at": self.evaluated_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.last, self.evaluated_at = state["best"], dict(state["last"]), state["evaluated_at"]


def _best_reward(metrics: dict[str, float]) -> float | None:
    """The mean reward, the highest one if options are swept; without a reward function, `metrics/reward`."""
    for name in ("reward/mean", "metrics/reward"):
        found = [value for key, value in metrics.items() if key.partition("@")[0] == name]
        if found:
            return max(found)
    return None


def print_samples(found: SampledMetrics, step: int, logger: Any) -> None:
    """Print a table of a few samples, if the logger shows messages of level INFO."""
    if not found.samples or not logger.isEnabledFor(20):
        return
    names = list(found.samples[0].scores)
    table = Table("prompt", "output", *names, title=f"Evaluation at step {step}", show_lines=True)
    for sample in found.samples[:SHOWN]:
        table.add_row(
            sample.prompt, sample.completion, *(str(significant(sample.scores.get(name, ""))) for name in names)
        )
    Console().print(table)
