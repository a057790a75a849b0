"""Sample completions for people to judge."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from trl.cli.label.arguments import LabelArguments
from trl.cli.loading import load_pretrained
from trl.cli.parser import ParsedOptions
from trl.cli.train import model_to_load
from trl.data.formats import PICTURES
from trl.data.sources import ScriptArguments, load_dataset_argument
from trl.errors import ConfigError, DataError
from trl.evaluation.samples import sample
from trl.models.load import tokenizer_of

TOGETHER = 16
"""Completions per sampling batch."""


def sample_rows(arguments: LabelArguments, given: ParsedOptions) -> list[dict[str, Any]]:
    """Sample `num_generations` completions per prompt from `model_name_or_path`; return rows of a prompt and
    completions.

    Raises ConfigError if `dataset_name` is missing, DataError if the dataset has no column `prompt`.
    """
    if arguments.dataset_name is None:
        raise ConfigError("--dataset_name is missing: give prompts for the model to continue.")
    prompts = _prompts(arguments)
    model, processor = load_pretrained(model_to_load(given))
    count = arguments.num_generations
    completions = sample(
        model,
        tokenizer_of(processor),
        Dataset.from_dict({"prompt": [prompt for prompt in prompts for _ in range(count)]}),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        batch_size=TOGETHER,
        seed=arguments.seed,
    )
    groups = (completions[i * count : (i + 1) * count] for i in range(len(prompts)))
    return [{"prompt": prompt, "completions": group} for prompt, group in zip(prompts, groups, strict=True)]


def _prompts(arguments: LabelArguments) -> list[Any]:
    script = ScriptArguments(dataset_name=arguments.dataset_name, dataset_train_split=arguments.dataset_split)
    rows = load_dataset_argument(script)[arguments.dataset_split]
    if "prompt" not in rows.column_names:
        raise DataError(f"dataset_name={arguments.dataset_name!r} has no column 'prompt': it has {rows.column_names}.")
    if pictures := sorted(PICTURES & set(rows.column_names)):
        raise DataError(
            f"The columns {pictures} hold images, which the page cannot show: sample with `trl eval`, or remove the columns."
        )
    prompts = rows.to_list()[: arguments.limit]
    return [_with_system(row["prompt"], arguments.system_prompt) for row in prompts]


def _with_system(prompt: Any, system: str | None) -> Any:
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages]
