"""Save images of the same prompts from the same noise before, during and after training, for the report.

pictures/000010-3.png            image 3 at step 10
pictures.jsonl                   its prompt, step, file and reward
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl.diffusion.rollouts import Row
from trl.rewards.images import to_pil

FOLDER, FILE = "pictures", "pictures.jsonl"


class DrawsPictures(Protocol):
    """The attributes of a trainer that the callback needs."""

    picture: Callable[[Sequence[Row]], tuple[Tensor, Tensor]]
    args: Any
    state: TrainerState


class PictureLog(TrainerCallback):
    """Saves images of the prompts in `rows` at the beginning, every `args.picture_steps` steps, and at the end."""

    def __init__(self, trainer: DrawsPictures, rows: Sequence[Row]) -> None:
        self.trainer, self.rows = trainer, rows
        self.last: int | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.draw(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.picture_steps and state.global_step % args.picture_steps == 0:
            self.draw(state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.draw(state)

    def draw(self, state: TrainerState) -> None:
        """Sample and save images, once per step. Only the main process does; the others wait for it at the next step."""
        if self.last == state.global_step or not state.is_world_process_zero:
            return
        self.last = state.global_step
        images, rewards = self.trainer.picture(self.rows)
        prompts = [row["prompt"] for row in self.rows]
        write_pictures(Path(self.trainer.args.output_dir), state.global_step, prompts, images, rewards)


def write_pictures(run: Path, step: int, prompts: Sequence[str], images: Tensor, rewards: Tensor) -> None:
    """Save images `[N,3,H,W]` as files with a row for each; rewards `[N]` are NaN if unknown."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    known = (run / FILE).read_text(encoding="utf-8").splitlines() if (run / FILE).is_file() else []
    rows = [row for row in map(json.loads, known) if row["step"] < step]  # a resumed run repeats steps
    for i, (picture, prompt, reward) in enumerate(zip(to_pil(images), prompts, rewards.tolist(), strict=True)):
        name = f"{FOLDER}/{step:06d}-{i}.png"
        picture.save(run / name)
        known_reward = {} if math.isnan(reward) else {"reward": reward}
        rows.append({"step": step, "number": i, "prompt": prompt, "file": name, **known_reward})
    (run / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
