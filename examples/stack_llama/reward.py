"""StackLlama, step 2: train a reward model, as an adapter, to rank the answer with more votes higher."""

from __future__ import annotations

from questions import adapter, pair_of, parser, quantization, questions

from trl import RewardConfig, RewardTrainer


def main() -> None:
    given = parser(__doc__, output_dir="stack/reward", steps=1000).parse_args()
    rows = questions(given.dataset)
    pairs = rows.map(pair_of, remove_columns=rows.column_names)
    args = RewardConfig(
        output_dir=given.output_dir,
        learning_rate=2e-5,
        max_length=1024,
        center_rewards_coefficient=0.01,
        max_steps=given.steps,
        save_strategy="no",
    )
    trainer = RewardTrainer(given.model, args, train_dataset=pairs, peft_config=adapter(), **quantization(given))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
