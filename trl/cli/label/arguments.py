"""Options of `trl label`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trl.errors import ConfigError
from trl.option_bounds import check_bounds


@dataclass
class LabelArguments:
    """What people judge in `trl label`, and where their answers are saved."""

    task: Literal["rate", "approve", "compare", "correct"] = "rate"
    """"rate": a mark from 1 to 5 for each completion; "approve": good or bad; "compare": the better of two; "correct": the
    completion as it should have been."""

    output: str = "labels.jsonl"
    """Dataset file to write; a journal of every answer is kept beside it. If the file exists, labelling resumes."""

    rows: Literal["score", "label", "pairs", "completions"] | None = None
    """Format of the dataset's rows: "score" (for `trl reward`), "label" (`trl kto`), "pairs" (`trl reward`, `trl dpo`)
    or "completions" (`trl sft`). None: score for "rate", label for "approve", pairs for "compare" and "correct"."""

    guidelines: str | None = None
    """Guidelines for raters: a text, or a .md or .txt file."""

    raters_per_item: int = 1
    """Number of different raters per item; with 2 or more, the page shows how well they agree."""

    shuffle: bool = True
    """Ask in a random order that depends only on `seed`. False: in the order of the file."""

    limit: int | None = None
    """Maximum number of items to ask about; with `model_name_or_path`, also of prompts. None: all."""

    port: int = 8765
    """Port of the web page; 0 for any free one."""

    share_on_lan: bool = False
    """Let other devices on the network open the page, with a token. False: only this machine can."""

    token: str | None = None
    """Access token that browsers must give. None: a random one with share_on_lan, else none is needed."""

    open_browser: bool = True
    """Open the page in this machine's browser."""

    dataset_name: str | None = None
    """Prompts for model_name_or_path to continue: a file, folder or hub name with the column `prompt`."""

    dataset_split: str = "train"
    """Split of dataset_name."""

    num_generations: int = 2
    """Completions to sample per prompt."""

    max_new_tokens: int = 256
    """Maximum number of tokens per sampled completion."""

    temperature: float = 1.0
    """Divides the logits in sampling."""

    system_prompt: str | None = None
    """System prompt before each prompt."""

    export_to: str | None = None
    """Export the answers so far to this file for another tool, and exit: .json for a list, .jsonl for lines."""

    export_format: Literal["argilla", "label_studio"] = "argilla"
    """The tool that `export_to` is for: Argilla (version 2) or Label Studio."""

    seed: int = 0
    """Random seed for the order and for sampling."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature}: give a positive number.")
