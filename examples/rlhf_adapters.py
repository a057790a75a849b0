"""All of RLHF with adapters only: one base model is in memory, policy, values, reference and reward model are its adapters.

    python examples/rlhf_adapters.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized

1. an adapter learns to imitate the chosen answers (SFT), and is merged into the base
2. an adapter learns to tell chosen from rejected answers (reward model)
3. an adapter learns to earn that reward (PPO); the reference is the base with no adapter on, the reward model the base with
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
    """Step 1; gives the folder of the base with the adapter merged."""
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
    """Step 2; gives the folder of the reward model's adapter."""
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
    """Step 3."""
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
    """Pairs with a column `prompt`: what both sides begin with, where there is none yet."""
    from trl import extract_prompt

    if "prompt" not in pairs.column_names:
        pairs = pairs.map(extract_prompt)
    return pairs.select_columns(["prompt", "chosen", "rejected"])


if __name__ == "__main__":
    main()
