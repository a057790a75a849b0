"""The model card: what was trained, how, and with which versions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

LIBRARIES = ("trl", "transformers", "torch", "datasets", "peft")
SHOWN = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")


def write_model_card(
    args: TrainingArguments,
    *,
    trainer: str,
    base: str | None,
    data: Sequence[Any],
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] | str | None = None,
) -> None:
    """Write README.md to the output folder.

    trainer   the name of the trainer's class
    base      name of the model that was trained; None: it was made from a configuration
    data      what became of the rows of each dataset, in words
    """
    method = trainer.removesuffix("Trainer")
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    front = {"library_name": "transformers", "tags": ["trl", method.lower(), *tags]}
    front |= {"base_model": base} if base else {}
    front |= {"datasets": [dataset_name]} if dataset_name else {}
    title = model_name or Path(args.output_dir).resolve().name
    options = "\n".join(f"| `{name}` | {getattr(args, name)} |" for name in SHOWN)
    versions = "\n".join(f"- {name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    reports = "\n".join(f"- {report}" for report in data)
    text = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"{f'`{base}`' if base else 'A model made from a configuration'}, trained with {method} by "
        f"`{trainer}` of trl.\n\n"
        f"## Data\n\n{reports}\n\n## Options\n\n| option | value |\n|---|---|\n{options}\n\n## Versions\n\n{versions}\n"
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
