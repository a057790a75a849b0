"""Options of `trl eval`."""

from __future__ import annotations

from dataclasses import dataclass

from trl.errors import ConfigError
from trl.option_bounds import check_bounds


@dataclass
class EvalArguments:
    """What is measured, on which rows, and by whom."""

    dataset_name: str | None = None
    """Hub name, folder or file of rows: with `prompt` for samples, rewards and win rates; for perplexity any rows that
    `trl sft` takes."""

    dataset_split: str = "test"
    """Split of the dataset; where it has "train" alone, that one is taken, with a message."""

    limit: int | None = None
    """Take at most this many rows, the first ones. None: all."""

    perplexity: bool = False
    """Measure the perplexity of the rows' texts, or of their completions: exp of the mean loss of a token, the lower the
    better."""

    assistant_only_loss: bool = False
    """With `perplexity`, of the assistant's turns alone."""

    benchmarks: list[str] | None = None
    """Names of tasks of lm-evaluation-harness, such as gsm8k ifeval: `pip install "trl[benchmarks]"`. They need no dataset_name;
    `limit` is then of the questions of each."""

    benchmarks_folder: str | None = None
    """Folder with YAML files of tasks of your own, for `benchmarks`."""

    chat: bool = False
    """Ask the questions of benchmarks in turns of the tokenizer's chat template."""

    reward_funcs: list[str] | None = None
    """Rewards of samples: names of trl.rewards, file.py:function, package.module:function; or hub names of reward models.
    With `against` they judge, unless a judge_server does."""

    against: str | None = None
    """Hub name or folder of another model, whose samples of the same prompts are compared with this one's."""

    judge_server: str | None = None
    """URL of an OpenAI-compatible server with a chat model that says which of two samples is better."""

    judge_model: str | None = None
    """Name of the model on judge_server. None: the server's only one."""

    pope: bool = False
    """Answers to yes-or-no questions by POPE's table: accuracy, precision, recall, F1 and the share of yes. Rows have a column
    `label` with yes or no."""

    chair: str | None = None
    """Objects that captions name and images do not hold, by CHAIR. A JSON file with all objects that are looked for, as a list
    or with synonyms by object; rows have a column `objects` with those of the image."""

    image_folder: str | None = None
    """Folder that relative paths of images start from."""

    max_pixels: int | None = None
    """Images beyond so many pixels (width · height) are made smaller."""

    max_new_tokens: int = 256
    """Tokens of a sample, at most."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""

    batch_size: int = 8
    """Prompts that are sampled from at once, and rows of a forward pass."""

    seed: int = 0
    """Seed of what is sampled."""

    output_dir: str = "evaluation"
    """Where eval.json and samples.jsonl go."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.dataset_name is None and self.benchmarks is None:
            raise ConfigError("--dataset_name is missing: rows to evaluate on. Or name --benchmarks.")
        if self.benchmarks is None and (self.benchmarks_folder or self.chat):
            raise ConfigError("benchmarks_folder and chat are for benchmarks: name some with --benchmarks.")
        if self.against is not None and not (self.reward_funcs or self.judge_server):
            raise ConfigError(
                "against names a model to compare with, and nobody judges: give reward_funcs or judge_server."
            )
        if self.judge_server is not None and self.against is None:
            raise ConfigError("judge_server compares samples of two models: give the other one, --against MODEL.")
