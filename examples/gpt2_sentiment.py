"""GPT-2 learns to write positive film reviews: PPO with a BERT sentiment classifier as the reward. arXiv:1909.08593.

    python examples/gpt2_sentiment.py                    your own loop: query, sample, score, PPOTrainer.step()
    python examples/gpt2_sentiment.py --loop train       the same with PPOTrainer.train()

The model completes the first words of a review; the reward is the classifier's log-odds of "positive". After about 100
steps most completions are positive; `objective/kl` is the KL from the initial model.
"""

from __future__ import annotations

import argparse
import random

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.rewards.classifier import ClassifierReward

SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0}


def openings(name: str, tokenizer: AutoTokenizer, *, seed: int, longest: int = 8) -> Dataset:
    """The first 2 to `longest` tokens of each review, as texts in the column `prompt`."""
    rng = random.Random(seed)

    def opening(row: dict[str, str]) -> dict[str, str]:
        ids = tokenizer(row["text"], truncation=True, max_length=longest)["input_ids"]
        return {"prompt": tokenizer.decode(ids[: rng.randint(2, longest)])}

    rows = load_dataset(name, split="train")
    return rows.map(opening, remove_columns=rows.column_names).shuffle(seed=seed)


def by_hand(
    config: PPOConfig, name: str, tokenizer: AutoTokenizer, reward: ClassifierReward, prompts: Dataset
) -> PPOTrainer:
    """In each round, sample completions of some openings, score them, and take PPO's optimizer steps."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
    trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)
    for start in range(0, config.max_steps * config.batch_size, config.batch_size):
        texts = [prompts[(start + i) % len(prompts)]["prompt"] for i in range(config.batch_size)]
        queries = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
        responses = trainer.generate(
            queries, return_prompt=False, max_new_tokens=config.max_completion_length, **SAMPLING
        )
        completions = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = [torch.tensor(score) for score in reward(texts, completions)]
        stats = trainer.step(queries, responses, scores)
        print(f"reward {stats['ppo/mean_scores']:.3f}   KL {stats['objective/kl']:.2f}   {texts[0]}|{completions[0]!r}")
    return trainer


def by_train(
    config: PPOConfig, name: str, tokenizer: AutoTokenizer, reward: ClassifierReward, prompts: Dataset
) -> PPOTrainer:
    """The same with the trainer's loop."""
    trainer = PPOTrainer(
        args=config, model=name, reward_funcs=reward, train_dataset=prompts, processing_class=tokenizer
    )
    trainer.train()
    return trainer


LOOPS = {"step": by_hand, "train": by_train}


def main() -> None:
    parser = argparse.ArgumentParser(description="GPT-2 to positive film reviews.")
    parser.add_argument("--model", default="lvwerra/gpt2-imdb")
    parser.add_argument("--classifier", default="lvwerra/distilbert-imdb")
    parser.add_argument("--dataset", default="stanfordnlp/imdb")
    parser.add_argument("--loop", choices=LOOPS, default="step")
    parser.add_argument(
        "--steps", type=int, default=100, help="rounds with --loop step, optimizer steps with --loop train"
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16, help="length of a continuation")
    parser.add_argument("--output_dir", default="gpt2-positive")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = PPOConfig(
        output_dir=given.output_dir,
        learning_rate=1.41e-5,
        batch_size=given.batch_size,
        mini_batch_size=max(1, given.batch_size // 8),
        max_completion_length=given.tokens,
        max_steps=given.steps,
        seed=0,
    )
    prompts = openings(given.dataset, tokenizer, seed=config.seed)
    trainer = LOOPS[given.loop](config, given.model, tokenizer, ClassifierReward(given.classifier), prompts)
    trainer.save_pretrained(given.output_dir)


if __name__ == "__main__":
    main()
