"""Questions and answers of Stack Exchange, as rows for each of the three steps, and common options."""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

PROMPT = "Question: {question}\n\nAnswer: "


def parser(about: str, *, output_dir: str, steps: int) -> argparse.ArgumentParser:
    """Command-line parser with the options that all three steps have."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--model", default="meta-llama/Llama-2-7b-hf")
    made.add_argument("--dataset", default="lvwerra/stack-exchange-paired")
    made.add_argument("--output_dir", default=output_dir)
    made.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    made.add_argument("--load_in_4bit", action="store_true", help="QLoRA")
    return made


def questions(name: str) -> Dataset:
    return load_dataset(name, split="train")


def prompt_of(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": PROMPT.format(question=row["question"])}


def pair_of(row: dict[str, Any]) -> dict[str, str]:
    """The answer with more votes is the chosen one."""
    return {**prompt_of(row), "chosen": row["response_j"], "rejected": row["response_k"]}


def answer_of(row: dict[str, Any]) -> dict[str, str]:
    return {**prompt_of(row), "completion": row["response_j"]}


def adapter() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")


def quantization(given: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of a trainer, for `--load_in_4bit`."""
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if given.load_in_4bit else {}
