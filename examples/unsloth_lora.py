"""SFT and then GRPO of one adapter, on a model that unsloth loads, in 16 or in 4 bits.

    python examples/unsloth_lora.py --model Qwen/Qwen2.5-0.5B-Instruct                    16 bits
    python examples/unsloth_lora.py --model Qwen/Qwen2.5-0.5B-Instruct --load_in_4bit     QLoRA
    python examples/unsloth_lora.py --tiny                                                a quick test, without a GPU or the hub

docs/lora.md says how to install unsloth together with trl. It must be imported first, since it patches other libraries.
"""

from __future__ import annotations

from unsloth import FastLanguageModel  # isort: skip

import argparse
import random
import re
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import LlamaConfig, LlamaForCausalLM

from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.demo.model import train_tokenizer

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def word_problems() -> Dataset:
    """Questions and worked answers of GSM8K."""
    return conversations(load_dataset("openai/gsm8k", "main", split="train"))


def sums(count: int = 400) -> Dataset:
    """Sums of two digits, for the model of `--tiny`."""
    rng = random.Random(0)
    pairs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(count)]
    rows = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}"} for a, b in pairs]
    return conversations(Dataset.from_list(rows))


def conversations(rows: Dataset) -> Dataset:
    return rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
    )


def is_right(completions: list, answer: list[str], **_: object) -> list[float]:
    """Reward function: 1 if the last number of the completion equals that of the answer, else 0."""
    return [float(last_number(c[0]["content"]) == last_number(a)) for c, a in zip(completions, answer, strict=True)]


def last_number(text: str) -> str | None:
    found = re.findall(r"-?\d[\d,]*", text)
    return found[-1].replace(",", "") if found else None


def write_tiny_model(folder: Path, rows: Dataset) -> str:
    """Save a Llama with random weights, and a tokenizer trained on the rows; return the folder."""
    tokenizer = train_tokenizer([*rows["question"], *rows["answer"]], vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="SFT and GRPO on a model of unsloth.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a random model that learns sums, in place of --model")
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage; 100, and 20 with --tiny")
    parser.add_argument("--tokens", type=int, default=256, help="length of an answer in GRPO")
    parser.add_argument("--output_dir", type=Path, default=Path("unsloth-lora"))
    given = parser.parse_args()
    steps = given.steps or (20 if given.tiny else 100)

    rows = sums() if given.tiny else word_problems()
    name = write_tiny_model(given.output_dir / "tiny", rows) if given.tiny else given.model
    model, tokenizer = FastLanguageModel.from_pretrained(
        name, max_seq_length=128 if given.tiny else 1024, load_in_4bit=given.load_in_4bit
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, target_modules=LAYERS, random_state=0)

    args = SFTConfig(
        output_dir=str(given.output_dir / "sft"),
        learning_rate=1e-2 if given.tiny else 2e-4,
        max_steps=steps,
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()

    args = GRPOConfig(
        output_dir=str(given.output_dir / "grpo"),
        learning_rate=1e-3 if given.tiny else 1e-5,
        num_generations=8,
        max_completion_length=16 if given.tiny else given.tokens,
        max_steps=steps,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=is_right,
        train_dataset=rows.select_columns(["prompt", "answer"]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
