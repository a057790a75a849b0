"""`trl demo`: fine-tune a small language model on the shipped film reviews, and show what changed.

trl demo                                  a GPT-2 of 1.4 million parameters, made and trained on the spot
trl demo --model_name_or_path gpt2        a real model
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers import logging as transformers_logging

from trl.demo.model import make_model, train_tokenizer
from trl.demo.reviews import is_grammatical, load_reviews
from trl.demo.sample import prompt_openings, sample
from trl.models.load import count_parameters, load_model, load_processor
from trl.trainers.progress import RichProgressCallback
from trl.trainers.sft import SFTConfig, SFTTrainer

SMALL = {"learning_rate": 4e-3, "num_train_epochs": 2, "adam_beta2": 0.98, "weight_decay": 0.0}
"""From random weights: the highest rate that trains this model without a spike."""
REAL = {"learning_rate": 5e-5, "num_train_epochs": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = read_options(argv)
    console = Console()
    transformers_logging.set_verbosity_error()
    set_seed(options.seed)
    train, test = load_reviews("train"), load_reviews("test")
    model, tokenizer = load(options.model_name_or_path, train["text"])
    prompts = prompt_openings(test.select(range(options.judged)))
    console.print(
        f"[bold]Supervised fine-tuning[/bold] of {type(model).__name__} ({count_parameters(model)[1] / 1e6:.1f} million "
        f"parameters) on {len(train):,} film reviews",
        highlight=False,
    )
    before = sample(model, tokenizer, prompts, seed=options.seed)
    fine_tune(model, tokenizer, train, test, options, console)
    after = sample(model, tokenizer, prompts, seed=options.seed)
    console.print(table_of_samples(prompts, before, after, rows=options.samples))
    console.print(
        f"Reviews that are grammatical throughout, of {len(prompts)} samples: "
        f"{share_grammatical(before):.0%} before, [bold]{share_grammatical(after):.0%}[/bold] after.\n"
        f"The model is in {options.output_dir}.",
        highlight=False,
    )
    return 0


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trl demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="a causal language model; default: one made on the spot")
    parser.add_argument("--output_dir", default="trl-demo", help="where the model goes; default: %(default)s")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop after so many optimizer steps")
    parser.add_argument("--samples", type=int, default=5, help="samples to show; default: %(default)s")
    parser.add_argument("--judged", type=int, default=200, help="samples to judge; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(argv)


def load(name: str | None, texts: Sequence[str]) -> tuple[Any, Any]:
    """A model and its tokenizer: by name, or made from a configuration and trained on the texts."""
    if name is None:
        tokenizer = train_tokenizer(texts)
        return make_model(tokenizer), tokenizer
    model = load_model(name)
    tokenizer = load_processor(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def fine_tune(model: Any, tokenizer: Any, train: Any, test: Any, options: argparse.Namespace, console: Console) -> None:
    recipe = SMALL if options.model_name_or_path is None else REAL
    args = SFTConfig(
        output_dir=options.output_dir,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_steps=options.max_steps,
        max_length=128,
        eval_strategy="epoch",
        logging_steps=10,
        save_strategy="no",
        seed=options.seed,
        **recipe,
    )
    trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RichProgressCallback(console))
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    console.print(f"Loss on {len(test):,} held-out reviews: [bold]{loss:.3f}[/bold] nats per token", highlight=False)
    trainer.save_model()


def share_grammatical(texts: Sequence[str]) -> float:
    """Share of texts that the reviews' grammar could have written."""
    return sum(map(is_grammatical, texts)) / len(texts)


def table_of_samples(prompts: Sequence[str], before: Sequence[str], after: Sequence[str], *, rows: int) -> Table:
    """What the model made of the same prompts before and after, prompts in bold."""
    table = Table("before", "after", title="Samples", show_lines=True, expand=True)
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:rows]:
        table.add_row(_marked(prompt, old, "dim"), _marked(prompt, new, ""))
    return table


def _marked(prompt: str, text: str, style: str) -> Any:
    from rich.text import Text

    return Text.assemble((prompt, "bold"), (text[len(prompt) :], style))
