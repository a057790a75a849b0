"""Options of `trl eval`."""

from __future__ import annotations

from dataclasses import dataclass

from trl.errors import ConfigError
from trl.evaluation.benchmarks import NEEDED_BY
from trl.imports import check_available
from trl.option_bounds import check_bounds


@dataclass
class EvalArguments:
    """What `trl eval` measures, on which rows, and who judges."""

    dataset_name: str | None = None
    """Hub name, folder or file of rows: with a column `prompt`, or chats in `messages`, for samples, rewards and win rates; for
    perplexity, any rows that `trl sft` takes."""

    dataset_split: str = "test"
    """Split of the dataset, or a slice of one: train[:100]. "test" means "train", with a message, if that is the only split."""

    limit: int | None = None
    """Use only the first rows, at most this many. None: all."""

    perplexity: bool = False
    """Measure the perplexity of the rows' texts, or of their completions: exp of the mean loss per token; lower is
    better."""

    assistant_only_loss: bool = False
    """With `perplexity`: count only tokens of the assistant's turns."""

    benchmarks: list[str] | None = None
    """Names of tasks of lm-evaluation-harness, such as gsm8k ifeval: `pip install "trl[benchmarks]"`. They need no
    dataset_name; `limit` limits the questions of each task."""

    benchmarks_folder: str | None = None
    """Folder with YAML files of your own tasks, for `benchmarks`."""

    chat: bool = False
    """Ask the questions of benchmarks with the tokenizer's chat template."""

    reward_funcs: list[str] | None = None
    """Rewards of samples: names from trl.rewards, file.py:function, package.module:function; or hub names of reward
    models. With `against`, the higher reward wins, unless judge_server judges."""

    against: str | None = None
    """Hub name or folder of another model, to compare its samples for the same prompts with this model's."""

    judge_server: str | None = None
    """URL of an OpenAI-compatible server with a chat model that judges which of two samples is better."""

    judge_model: str | None = None
    """Name of the model on judge_server. None: the server's only one."""

    pope: bool = False
    """Score answers to yes-or-no questions as POPE does: accuracy, precision, recall, F1 and the share of yes. Rows
    need a column `label` with yes or no."""

    chair: str | None = None
    """Measure with CHAIR how often captions name objects that are not in the image. A JSON file with all objects to
    look for, as a list or with synonyms by object; rows need a column `objects` with the objects in the image."""

    image_folder: str | None = None
    """Folder that relative paths of images refer to."""

    max_pixels: int | None = None
    """Images with more pixels (width · height) are scaled down to this number."""

    max_new_tokens: int = 256
    """Maximum number of tokens per sample."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy decoding."""

    batch_size: int = 8
    """Prompts per sampling batch, and rows per forward pass."""

    seed: int = 0
    """Random seed for sampling."""

    output_dir: str = "evaluation"
    """Folder for eval.json and samples.jsonl."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.dataset_name is None and self.benchmarks is None:
            raise ConfigError("--dataset_name is missing: give rows to evaluate on, or name --benchmarks.")
        if self.benchmarks is None and (self.benchmarks_folder or self.chat):
            raise ConfigError("benchmarks_folder and chat are for benchmarks: name some with --benchmarks.")
        if self.benchmarks is not None:
            check_available("lm_eval", to=NEEDED_BY)
        if self.against is not None and not (self.reward_funcs or self.judge_server):
            raise ConfigError(
                "against names a model to compare with, but nothing judges the samples: give reward_funcs or judge_server."
            )
        if self.judge_server is not None and self.against is None:
            raise ConfigError("judge_server compares samples of two models: give the other model, --against MODEL.")
