"""Human feedback in the loop: the model completes some queries, you rate the responses, and PPO trains it on your ratings.

    trl demo                                          trains a small model that writes film reviews
    python examples/human_feedback.py trl-demo/sft

Ratings are saved in ratings.jsonl, on which `RewardTrainer` can train a reward model. `q` ends the loop, and saves the model in
human-feedback/.
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.rewards.human import HumanRating

QUERIES = ["The film follows a", "Set in a small", "In this quiet drama", "The director of the"]
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 32}


def main(name: str) -> None:
    model, tokenizer = AutoModelForCausalLMWithValueHead.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    config = PPOConfig(batch_size=len(QUERIES), mini_batch_size=len(QUERIES), learning_rate=1e-4)
    trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)
    queries = [tokenizer(query, return_tensors="pt")["input_ids"][0] for query in QUERIES]
    rate = HumanRating("ratings.jsonl")
    try:
        while True:
            responses = trainer.generate(queries, return_prompt=False, **SAMPLING)
            marks = rate(QUERIES, tokenizer.batch_decode(responses, skip_special_tokens=True))
            stats = trainer.step(queries, responses, [mark or 0.0 for mark in marks])
            print(f"mean reward {stats['ppo/mean_scores']:.2f}, KL from the first model {stats['objective/kl']:.2f}")
    except KeyboardInterrupt:
        trainer.save_pretrained("human-feedback")
        print("The model is in human-feedback.")


if __name__ == "__main__":
    main(sys.argv[1])
