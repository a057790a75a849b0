"""The model card: what was trained, how, what came of it, and how it is used. Made to be published: no path of this machine is in it."""

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
from trl.training.beside import not_fatal

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
"""Method → title and arXiv number of the paper that it is from."""

TASKS = {"reward": "text-classification", "pictures": "text-to-image"}
"""Kind of model → what the hub calls its task, where that is not to write text."""

SHOWN = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Options that are told even where they are at their defaults."""

_METRICS = re.compile(r"^(eval_)?(loss|reward|accuracy|mean_token_accuracy|kl|rewards/(accuracies|margins))$")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Trained:
    """What the card tells of a model.

    base         name of the model that was trained; None: it was made from a configuration
    kind         "causal", "encoder-decoder", "reward" or "pictures"
    is_adapter   an adapter on the base, and not a whole model
    is_chat      its tokenizer has a chat template
    """

    base: str | None
    kind: str = "causal"
    is_adapter: bool = False
    is_chat: bool = False

    @property
    def library(self) -> str:
        """What loads the model."""
        return "diffusers" if self.kind == "pictures" else "peft" if self.is_adapter else "transformers"


class WritesModelCard(Trainer):
    """A trainer that writes a model card beside its checkpoints, and when it is asked to."""

    def describe_model(self) -> tuple[Trained, Sequence[Any]]:
        """The model, and what became of the rows of each dataset, in words."""
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
        """Into the output folder of `args`; a run goes on where that fails."""
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

    trainer   the name of the trainer's class
    data      what became of the rows of each dataset, in words
    options   those that differ from their defaults
    log       what the run logged; its last metrics are told
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
    """What the hub reads of a card."""
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    front: dict[str, Any] = {"library_name": model.library}
    front |= {"base_model": base} if base else {}
    front |= {"datasets": [dataset_name]} if hub_id(dataset_name) else {}
    front |= {"license": found} if (found := license_of(model.base)) else {}
    front |= {"pipeline_tag": TASKS.get(model.kind, "text-generation")}
    return {**front, "tags": ["trl", method.lower(), *(["lora"] if model.is_adapter else []), *tags]}


def hub_id(name: str | None) -> str | None:
    """The name, if it is one that others can use: a folder of this machine is none."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of(base: str | None) -> str | None:
    """The licence that the base model's card names, where that is at hand."""
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
    """The options without those that hold a place on this machine, or a secret."""
    return {
        name: value
        for name, value in options.items()
        if not (isinstance(value, str) and ("/" in value or "\\" in value) and hub_id(value) is None)
        and not name.endswith(("_dir", "_token", "_path"))
    }


def last_metrics(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the leading metrics were when they were last logged."""
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
    """A program that loads the model by the name that it has on the hub, or its folder's, and uses it."""
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
