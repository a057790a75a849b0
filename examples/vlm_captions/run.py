"""Captions with fewer things that are not there: imitate, then DPO on pairs, then GRPO with CHAIR and POPE.

python run.py                                          a tiny LLaVA on pictures that are drawn here: minutes on a CPU
python run.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name openbmb/RLAIF-V-Dataset
                                                       DPO of a real model on real pairs, by adapters
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from pictures import (
    LONGEST,
    THINGS,
    evaluate,
    imitation_rows,
    make_model,
    make_processor,
    pair_rows,
    prompt_rows,
    question_rows,
)
from torch import nn
from transformers import PrinterCallback

from trl import (
    ChairReward,
    ChairScores,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PopeScores,
    SFTConfig,
    SFTTrainer,
    pope_reward,
)

QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "html_report": False}
Measured = dict[str, tuple[ChairScores, PopeScores]]


def _train(cls: type, model: nn.Module, config: Any, rows: Any, **more: Any) -> None:
    trainer = cls(model=model, args=config, train_dataset=rows, processing_class=make_processor(), **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def imitate(model: nn.Module, folder: str, *, steps: int, seed: int) -> None:
    """Captions and answers of which half name things that are not there."""
    config = SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=3e-3, lr_scheduler_type="cosine",
        warmup_steps=20, seed=seed, **QUIET,
    )  # fmt: skip
    _train(SFTTrainer, model, config, imitation_rows(4000))


def prefer(model: nn.Module, folder: str, *, steps: int, seed: int) -> None:
    """True captions and answers against those with a thing too many."""
    config = DPOConfig(
        folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=3e-4, lr_scheduler_type="constant",
        beta=0.1, seed=seed, **QUIET,
    )  # fmt: skip
    _train(DPOTrainer, model, config, pair_rows(1500))


def reinforce(model: nn.Module, folder: str, *, steps: int, seed: int) -> None:
    """Captions by CHAIR, then answers by POPE."""
    config = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 64, "num_generations": 8,
        "learning_rate": 3e-4, "lr_scheduler_type": "constant", "beta": 0.0, "seed": seed, **QUIET,
    }  # fmt: skip
    captions = GRPOConfig(**config, max_completion_length=LONGEST)
    _train(GRPOTrainer, model, captions, prompt_rows(500), reward_funcs=ChairReward(THINGS))
    _train(
        GRPOTrainer, model, GRPOConfig(**config, max_completion_length=2), question_rows(500), reward_funcs=pope_reward
    )


def run(*, seed: int = 0, steps: tuple[int, int, int] = (400, 100, 60), count: int = 100) -> Measured:
    """CHAIR and POPE after each stage."""
    model, measured = make_model(seed), {}
    stages = {"imitation": imitate, "DPO": prefer, "GRPO": reinforce}
    with tempfile.TemporaryDirectory() as folder:
        for (name, stage), number in zip(stages.items(), steps, strict=True):
            torch.manual_seed(seed)
            stage(model, folder, steps=number, seed=seed)
            measured[name] = evaluate(model.eval(), count=count)
            show(name, *measured[name])
    return measured


def show(name: str, chair: ChairScores, pope: PopeScores) -> None:
    numbers = {"CHAIR_i": chair.chair_i, "CHAIR_s": chair.chair_s, "recall": chair.recall, "POPE F1": pope.f1}
    print(f"after {name:10}", *(f"{key} {value:.3f} {'█' * round(20 * value):20}" for key, value in numbers.items()))


def real(model: str, dataset: str, folder: str, *, max_pixels: int) -> None:
    """DPO of a model of the hub on pairs with images, `question, image, chosen, rejected`, by adapters."""
    from datasets import load_dataset
    from peft import LoraConfig

    config = DPOConfig(
        folder, learning_rate=5e-6, lr_scheduler_type="cosine", warmup_steps=0.05, beta=0.1, num_train_epochs=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=8, max_length=2048, max_pixels=max_pixels,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    rows = load_dataset(dataset, split="train").select_columns(["question", "image", "chosen", "rejected"])
    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(model=model, args=config, train_dataset=rows, peft_config=peft)
    trainer.train()
    trainer.save_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="vlm_captions")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--dataset_name", default="openbmb/RLAIF-V-Dataset")
    parser.add_argument("--max_pixels", type=int, default=512 * 512)
    args = parser.parse_args()
    if args.model_name_or_path:
        real(args.model_name_or_path, args.dataset_name, args.output_dir, max_pixels=args.max_pixels)
        return
    measured = run(seed=args.seed)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    numbers = {name: {**chair.as_dict(), **pope.as_dict()} for name, (chair, pope) in measured.items()}
    Path(args.output_dir, "measured.json").write_text(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
