"""StackLlama, step 1: SFT trains an adapter on the answers with more votes, and merges it into the model."""

from __future__ import annotations

from pathlib import Path

from peft import AutoPeftModelForCausalLM
from questions import adapter, answer_of, parser, quantization, questions
from transformers import AutoTokenizer

from trl import SFTConfig, SFTTrainer


def main() -> None:
    given = parser(__doc__, output_dir="stack/sft", steps=1000).parse_args()
    rows = questions(given.dataset)
    rows = rows.map(answer_of, remove_columns=rows.column_names)
    folder = Path(given.output_dir)
    args = SFTConfig(
        output_dir=str(folder / "adapter"),
        learning_rate=1e-4,
        max_length=1024,
        max_steps=given.steps,
        save_strategy="no",
    )
    trainer = SFTTrainer(given.model, args, train_dataset=rows, peft_config=adapter(), **quantization(given))
    trainer.train()
    trainer.save_model()
    AutoPeftModelForCausalLM.from_pretrained(args.output_dir).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.output_dir).save_pretrained(folder)


if __name__ == "__main__":
    main()
