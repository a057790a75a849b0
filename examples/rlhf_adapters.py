"""RLHF with LoRA adapters: policy, values, reference and reward model share one base model in memory.

    python examples/rlhf_adapters.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized

1. SFT trains an adapter on the chosen answers, and merges it into the base
2. a reward model is trained as a second adapter, on chosen and rejected answers
3. PPO trains a third adapter on that reward; the reference is the base with adapters disabled, the reward model the base with
   the adapter of step 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoTokenizer

from trl import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)


def adapter(task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)


def imitate(name: str, pairs: Dataset, folder: Path, steps: int) -> str:
    """Step 1: SFT. Returns the folder of the base model with the merged adapter."""
    rows = pairs.rename_column("chosen", "completion").remove_columns("rejected")
    args = SFTConfig(output_dir=str(folder / "sft"), learning_rate=2e-4, max_steps=steps, save_strategy="no")
    trainer = SFTTrainer(name, args, train_dataset=rows, peft_config=adapter())
    trainer.train()
    trainer.save_model()
    merged = str(folder / "base")
    AutoPeftModelForCausalLM.from_pretrained(args.output_dir).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(args.output_dir).save_pretrained(merged)
    return merged


def learn_rewards(base: str, pairs: Dataset, folder: Path, steps: int) -> str:
    """Step 2: reward model. Returns the folder of its adapter."""
    args = RewardConfig(
        output_dir=str(folder / "reward"),
        learning_rate=1e-4,
        center_rewards_coefficient=0.01,
        max_steps=steps,
        save_strategy="no",
    )
    trainer = RewardTrainer(base, args, train_dataset=pairs, peft_config=adapter("SEQ_CLS"))
    trainer.train()
    trainer.save_model()
    return args.output_dir


def reinforce(base: str, reward: str, pairs: Dataset, folder: Path, given: argparse.Namespace) -> None:
    """Step 3: PPO."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=adapter(), reward_adapter=reward)
    args = PPOConfig(
        output_dir=str(folder / "ppo"),
        learning_rate=1e-5,
        batch_size=given.batch_size,
        mini_batch_size=max(1, given.batch_size // 4),
        max_completion_length=given.tokens,
        max_steps=given.steps,
        save_strategy="no",
    )
    prompts = pairs.select_columns(["prompt"])
    trainer = PPOTrainer(
        args=args, model=model, train_dataset=prompts, processing_class=AutoTokenizer.from_pretrained(base)
    )
    trainer.train()
    trainer.save_pretrained(args.output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description="RLHF with adapters only.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument(
        "--dataset", default="trl-lib/ultrafeedback_binarized", help="rows with prompt, chosen, rejected"
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each stage")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="length of an answer in PPO")
    parser.add_argument("--output_dir", type=Path, default=Path("rlhf-adapters"))
    given = parser.parse_args()

    pairs = explicit_prompts(load_dataset(given.dataset, split="train"))
    base = imitate(given.model, pairs, given.output_dir, given.steps)
    reward = learn_rewards(base, pairs, given.output_dir, given.steps)
    reinforce(base, reward, pairs, given.output_dir, given)


def explicit_prompts(pairs: Dataset) -> Dataset:
    """Pairs with a column `prompt`; if it is missing, it is the common beginning of both answers."""
    from trl import extract_prompt

    if "prompt" not in pairs.column_names:
        pairs = pairs.map(extract_prompt)
    return pairs.select_columns(["prompt", "chosen", "rejected"])


if __name__ == "__main__":
    main()
