"""Options of `trl label`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trl.errors import ConfigError
from trl.option_bounds import check_bounds


@dataclass
class LabelArguments:
    """What is judged, by whom, and where the answers go."""

    task: Literal["rate", "approve", "compare", "correct"] = "rate"
    """"rate": a mark from 1 to 5 for each completion; "approve": good or bad; "compare": the better of two; "correct": the
    completion as it should have been."""

    output: str = "labels.jsonl"
    """The dataset that the answers make; a journal of every answer stands beside it. An output that is there is resumed."""

    rows: Literal["score", "label", "pairs", "completions"] | None = None
    """What the dataset holds: "score" (for `trl reward`), "label" (`trl kto`), "pairs" (`trl reward`, `trl dpo`) or
    "completions" (`trl sft`). None: score for "rate", label for "approve", pairs for "compare" and "correct"."""

    guidelines: str | None = None
    """What raters are told: a text, or a file that holds it."""

    raters_per_item: int = 1
    """Answers wanted of each item, each by somebody else; from 2 on, the page shows how well they agree."""

    shuffle: bool = True
    """Ask in random order, always the same. False: in the order of the file."""

    limit: int | None = None
    """Ask about so many items at most."""

    port: int = 8765
    """Port of the page; 0 for a free one."""

    share_on_lan: bool = False
    """Let other devices of the network open the page, with a token. False: this machine alone."""

    token: str | None = None
    """What a browser has to show. None: a random one with share_on_lan, else none."""

    open_browser: bool = True
    """Open the page in this machine's browser."""

    dataset_name: str | None = None
    """Prompts for model_name_or_path to continue: a file, folder or hub name with the column `prompt`."""

    dataset_split: str = "train"
    """Split of dataset_name."""

    num_generations: int = 2
    """Completions that are sampled of each prompt."""

    max_new_tokens: int = 256
    """Tokens of a completion that is sampled, at most."""

    temperature: float = 1.0
    """Divides the logits of what is sampled."""

    system_prompt: str | None = None
    """What the model is told before each prompt."""

    export_to: str | None = None
    """Write the answers that are there to this file for another tool, and end: .json for a list, .jsonl for lines."""

    export_format: Literal["argilla", "label_studio"] = "argilla"
    """The tool that `export_to` is for: Argilla (version 2) or Label Studio."""

    seed: int = 0
    """Seed of the order and of what is sampled."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature}: give a positive number.")
