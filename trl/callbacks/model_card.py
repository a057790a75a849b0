"""The model card: what was trained, how, and with which versions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from trl.trainers.base import BaseTrainer

LIBRARIES = ("trl", "transformers", "torch", "datasets", "peft")
SHOWN = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")


def write_model_card(
    trainer: BaseTrainer, *, model_name: str | None, dataset_name: str | None, tags: Sequence[str] | str | None
) -> None:
    """Write README.md to the trainer's output folder."""
    base = trainer.model.config.to_dict().get("_name_or_path") or None
    method = type(trainer).__name__.removesuffix("Trainer")
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    front = {"library_name": "transformers", "tags": ["trl", method.lower(), *tags]}
    front |= {"base_model": base} if base else {}
    front |= {"datasets": [dataset_name]} if dataset_name else {}
    title = model_name or Path(trainer.args.output_dir).resolve().name
    options = "\n".join(f"| `{name}` | {getattr(trainer.args, name)} |" for name in SHOWN)
    versions = "\n".join(f"- {name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    reports = "\n".join(f"- {encoded.report}" for encoded in trainer.encoded.values())
    text = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"{f'`{base}`' if base else 'A model made from a configuration'}, trained with {method} by "
        f"`{type(trainer).__name__}` of trl.\n\n"
        f"## Data\n\n{reports}\n\n## Options\n\n| option | value |\n|---|---|\n{options}\n\n## Versions\n\n{versions}\n"
    )
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
