"""StackLlama, step 3: PPO trains an adapter on the reward model of step 2; both share one base model."""

from __future__ import annotations

from questions import adapter, parser, prompt_of, questions
from transformers import AutoTokenizer

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def main() -> None:
    parse = parser(__doc__, output_dir="stack/rl", steps=400)
    parse.add_argument("--reward", default="stack/reward", help="the folder of step 2")
    parse.add_argument("--batch_size", type=int, default=32)
    parse.add_argument("--tokens", type=int, default=128, help="length of an answer")
    given = parse.parse_args()
    rows = questions(given.dataset)
    prompts = rows.map(prompt_of, remove_columns=rows.column_names)
    bits = {"load_in_4bit": True} if given.load_in_4bit else {}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        given.model, peft_config=adapter(), reward_adapter=given.reward, **bits
    )
    args = PPOConfig(
        output_dir=given.output_dir,
        learning_rate=1.4e-5,
        batch_size=given.batch_size,
        mini_batch_size=max(1, given.batch_size // 4),
        init_kl_coef=0.2,
        max_completion_length=given.tokens,
        max_prompt_length=512,
        max_steps=given.steps,
        save_strategy="no",
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = PPOTrainer(args=args, model=model, train_dataset=prompts, processing_class=tokenizer)
    trainer.train()
    trainer.save_pretrained(given.output_dir)


if __name__ == "__main__":
    main()
