"""The model card: what was trained, how, with which results, and how to use it.

It is made to be published, and so contains no local paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from transformers import Trainer, TrainingArguments

from trl.callbacks.report import changed_options, version_of
from trl.training.auxiliary_files import not_fatal

LIBRARIES = ("trl", "transformers", "torch", "datasets", "peft")

PAPERS = {
    "SFT": ("Training language models to follow instructions with human feedback", "2203.02155"),
    "Reward": ("Training language models to follow instructions with human feedback", "2203.02155"),
    "DPO": ("Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "2305.18290"),
    "CPO": ("Contrastive Preference Optimization", "2401.08417"),
    "ORPO": ("ORPO: Monolithic Preference Optimization without Reference Model", "2403.07691"),
    "KTO": ("KTO: Model Alignment as Prospect Theoretic Optimization", "2402.01306"),
    "BCO": ("Binary Classifier Optimization for Large Language Model Alignment", "2404.04656"),
    "PPO": ("Fine-Tuning Language Models from Human Preferences", "1909.08593"),
    "GRPO": ("DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", "2402.03300"),
    "RLOO": ("Back to Basics: Revisiting REINFORCE Style Optimization", "2402.14740"),
    "OnlineDPO": ("Direct Language Model Alignment from Online AI Feedback", "2402.04792"),
    "ILQL": ("Offline RL for Natural Language Generation with Implicit Language Q Learning", "2206.11871"),
    "DDPO": ("Training Diffusion Models with Reinforcement Learning", "2305.13301"),
    "DiffusionDDPO": ("Training Diffusion Models with Reinforcement Learning", "2305.13301"),
    "DiffusionGRPO": ("Flow-GRPO: Training Flow Matching Models via Online RL", "2505.05470"),
    "DiffusionDPO": ("Diffusion Model Alignment Using Direct Preference Optimization", "2311.12908"),
    "AlignProp": ("Aligning Text-to-Image Diffusion Models with Reward Backpropagation", "2310.03739"),
}
"""Method → title and arXiv number of its paper."""

TASKS = {"reward": "text-classification", "pictures": "text-to-image"}
"""Kind of model → its pipeline tag on the hub; that of other kinds is text-generation."""

SHOWN = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Options that are listed even if they have their default values."""

_METRICS = re.compile(r"^(eval_)?(loss|reward|accuracy|mean_token_accuracy|kl|rewards/(accuracies|margins))$")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Trained:
    """The facts about a trained model for its card.

    base         name of the base model; None if the model was made from a configuration
    kind         "causal", "encoder-decoder", "reward" or "pictures"
    is_adapter   whether it is an adapter on the base model, not a whole model
    is_chat      whether its tokenizer has a chat template
    """

    base: str | None
    kind: str = "causal"
    is_adapter: bool = False
    is_chat: bool = False

    @property
    def library(self) -> str:
        """The library that loads the model."""
        return "diffusers" if self.kind == "pictures" else "peft" if self.is_adapter else "transformers"


class WritesModelCard(Trainer):
    """A trainer that writes a model card to its output folder, with each checkpoint and by `create_model_card`."""

    def describe_model(self) -> tuple[Trained, Sequence[Any]]:
        """The facts about the model, and a report on the rows of each dataset."""
        raise NotImplementedError

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: Sequence[str] | str | None = None,
        **_: Any,
    ) -> None:
        """Write README.md to the output folder: what was trained, how, and with which versions."""
        self._write_card(self.args, model_name=model_name, dataset_name=dataset_name, tags=tags)

    def _write_card(self, args: TrainingArguments, **named: Any) -> None:
        """Write the card to the output folder of `args`; a failure does not stop the run."""
        if self.is_world_process_zero():
            options = args.to_dict()
            with not_fatal("The model card"):
                model, data = self.describe_model()
                write_model_card(
                    args,
                    trainer=type(self).__name__,
                    model=model,
                    data=data,
                    options={name: options[name] for name in changed_options(args)},
                    log=self.state.log_history,
                    **named,
                )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(*args, **kwargs)


def write_model_card(
    args: TrainingArguments,
    *,
    trainer: str,
    model: Trained,
    data: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    log: Sequence[Mapping[str, Any]] = (),
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] | str | None = None,
) -> None:
    """Write README.md to the output folder.

    trainer   name of the trainer's class
    data      a report on the rows of each dataset
    options   options that differ from their defaults
    log       log of the run; the last values of its main metrics are listed
    """
    method = trainer.removesuffix("Trainer")
    base = hub_id(model.base)
    folder = Path(args.output_dir).resolve()
    title = model_name or folder.name
    shown = {name: getattr(args, name) for name in SHOWN} | published(options or {})
    sections = {
        "Use": _usage(args.hub_model_id or folder.name, model, base),
        "Results": _table("metric", last_metrics(log)),
        "Data": "\n".join(f"- {report}" for report in data),
        "Options": _table("option", shown),
        "Paper": _paper(method),
        "Versions": "\n".join(f"- {name} {version_of(name)}" for name in dict.fromkeys((*LIBRARIES, model.library))),
    }
    unnamed = "a model that has no public name" if model.base else "a model made from a configuration"
    named = f"`{base}`" if base else unnamed
    what = f"An adapter of {named}" if model.is_adapter else named[0].upper() + named[1:]
    text = (
        f"---\n{yaml.safe_dump(_front(method, model, base, dataset_name, tags), sort_keys=False)}---\n\n# {title}\n\n"
        f"{what}, trained with {method} by `{trainer}` of trl.\n\n"
        + "\n\n".join(f"## {name}\n\n{content}" for name, content in sections.items() if content)
        + "\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _front(
    method: str, model: Trained, base: str | None, dataset_name: str | None, tags: Sequence[str] | str | None
) -> dict[str, Any]:
    """The metadata at the top of a card, which the hub reads."""
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    front: dict[str, Any] = {"library_name": model.library}
    front |= {"base_model": base} if base else {}
    front |= {"datasets": [dataset_name]} if hub_id(dataset_name) else {}
    front |= {"license": found} if (found := license_of(model.base)) else {}
    front |= {"pipeline_tag": TASKS.get(model.kind, "text-generation")}
    return {**front, "tags": ["trl", method.lower(), *(["lora"] if model.is_adapter else []), *tags]}


def hub_id(name: str | None) -> str | None:
    """The name if it is a hub id; None for a local folder."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of(base: str | None) -> str | None:
    """The licence in the base model's card, if the card is in a local folder or in the hub's cache; else None."""
    if base is None:
        return None
    card = Path(base) / "README.md"
    if not card.is_file() and hub_id(base):
        cached = try_to_load_from_cache(base, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\n.*?^license: *([\w.+-]+)$.*?^---$", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def published(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without local paths and secrets."""
    return {
        name: value
        for name, value in options.items()
        if not (isinstance(value, str) and ("/" in value or "\\" in value) and hub_id(value) is None)
        and not name.endswith(("_dir", "_token", "_path"))
    }


def last_metrics(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last logged values of the main metrics."""
    rows = {name: row[name] for row in log for name in row if _METRICS.match(name)}
    return {name: f"{value:.4g}" for name, value in rows.items()}


def _table(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = (f"| `{name}` | {str(value).replace('|', chr(92) + '|')} |" for name, value in values.items())
    return "\n".join([f"| {title} | value |", "|---|---|", *rows])


def _paper(method: str) -> str:
    title, number = PAPERS.get(method, ("", ""))
    return f"{title}, [arXiv:{number}](https://arxiv.org/abs/{number})" if title else ""


def _usage(name: str, model: Trained, base: str | None) -> str:
    """Example code that loads the model by its hub name or folder, and uses it."""
    if model.kind == "reward":
        return (
            "```python\nfrom trl.rewards.model import RewardModel\n\n"
            f'reward = RewardModel("{name}")\nreward(["A prompt"], [" and its completion"])\n```'
        )
    if model.kind == "pictures":
        whole = (base or "the pipeline that was trained") if model.is_adapter else name
        adapter = f'pipeline.load_lora_weights("{name}")\n' if model.is_adapter else ""
        return (
            "```python\nfrom diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{whole}")\n{adapter}'
            'pipeline("A prompt").images[0].save("picture.png")\n```'
        )
    auto = "AutoModelForSeq2SeqLM" if model.kind == "encoder-decoder" else "AutoModelForCausalLM"
    inputs = (
        'messages = [{"role": "user", "content": "A prompt"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)\n'
        if model.is_chat
        else 'inputs = tokenizer("A prompt", return_tensors="pt")\n'
    )
    return (
        f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f'model, tokenizer = {auto}.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")\n'
        f"{inputs}tokens = model.generate(**inputs, max_new_tokens=64)\n"
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))\n```"
    )
