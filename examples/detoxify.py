"""A less toxic language model: PPO with a hate-speech classifier as the reward.

    python examples/detoxify.py --model EleutherAI/gpt-j-6b
    python examples/detoxify.py                              the same with a model of 125 million parameters

Prompts are beginnings of comments that language models tend to complete with toxic text (RealToxicityPrompts,
arXiv:2009.11462). The reward is the classifier's log-odds of "nothate". `--adapter` trains a LoRA adapter, for large models.
"""

from __future__ import annotations

import argparse

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from trl import PPOConfig, PPOTrainer
from trl.rewards.classifier import ClassifierReward

LEAST_TOXIC = 0.3
"""Prompts with a lower toxicity score are dropped: their completions are seldom toxic."""


def toxic_prompts(name: str) -> Dataset:
    """Prompts of comments in `allenai/real-toxicity-prompts`, or of a dataset whose column `prompt` has texts."""
    rows = load_dataset(name, split="train")
    if isinstance(rows[0]["prompt"], str):
        return rows.select_columns(["prompt"])
    rows = rows.filter(lambda row: (row["prompt"]["toxicity"] or 0.0) > LEAST_TOXIC)
    return Dataset.from_dict({"prompt": [prompt["text"] for prompt in rows["prompt"]]})


def main() -> None:
    parser = argparse.ArgumentParser(description="A less toxic language model.")
    parser.add_argument("--model", default="EleutherAI/gpt-neo-125m")
    parser.add_argument("--classifier", default="facebook/roberta-hate-speech-dynabench-r4-target")
    parser.add_argument("--label", default="nothate", help="the classifier's label that is rewarded")
    parser.add_argument("--dataset", default="allenai/real-toxicity-prompts")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=30, help="length of a continuation")
    parser.add_argument("--adapter", action="store_true", help="train a LoRA adapter in place of all weights")
    parser.add_argument("--output_dir", default="less-toxic")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    args = PPOConfig(
        output_dir=given.output_dir,
        learning_rate=1e-4 if given.adapter else 1e-5,
        batch_size=given.batch_size,
        mini_batch_size=max(1, given.batch_size // 4),
        max_completion_length=given.tokens,
        max_steps=given.steps,
        log_completions=True,
        num_completions_to_print=0,
    )
    trainer = PPOTrainer(
        args=args,
        model=given.model,
        reward_funcs=ClassifierReward(given.classifier, positive_label=given.label),
        train_dataset=toxic_prompts(given.dataset),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32) if given.adapter else None,
    )
    trainer.train()
    trainer.save_pretrained(given.output_dir)


if __name__ == "__main__":
    main()
