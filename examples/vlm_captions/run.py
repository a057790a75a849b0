"""Captions with fewer hallucinated objects: SFT, then DPO on pairs, or GRPO with CHAIR and POPE as rewards.

python run.py                                          a tiny LLaVA on generated pictures: minutes on a CPU
python run.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name openbmb/RLAIF-V-Dataset
                                                       DPO of a real model on real pairs, with an adapter
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from pictures import (
    LONGEST,
    THINGS,
    Measured,
    caption,
    evaluate,
    imitation_rows,
    make_model,
    make_processor,
    pair_rows,
    prompt_rows,
    question_rows,
)
from plots import bars, sheet
from torch import nn
from transformers import PrinterCallback

from trl import (
    ChairReward,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
    pope_reward,
)

QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "html_report": False}


def _train(cls: type, model: nn.Module, config: Any, rows: Any, **more: Any) -> nn.Module:
    trainer = cls(model=model, args=config, train_dataset=rows, processing_class=make_processor(), **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


def imitate(model: nn.Module, folder: str, *, steps: int, seed: int) -> nn.Module:
    """SFT on captions and answers, most of which hallucinate an object."""
    config = SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=3e-3, lr_scheduler_type="cosine",
        warmup_steps=20, seed=seed, **QUIET,
    )  # fmt: skip
    return _train(SFTTrainer, model, config, imitation_rows(3000))


def prefer(model: nn.Module, folder: str, *, steps: int, seed: int) -> nn.Module:
    """DPO on pairs of a true caption and one with an additional object.

    The two differ only at their end, so DPO learns when to stop: with a small β, the model stops before all objects are named.
    """
    config = DPOConfig(
        folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=3e-5, lr_scheduler_type="cosine",
        beta=2.0, seed=seed, **QUIET,
    )  # fmt: skip
    return _train(DPOTrainer, model, config, pair_rows(1000))


def reinforce(model: nn.Module, folder: str, *, steps: int, seed: int) -> nn.Module:
    """GRPO on captions, with CHAIR, and on answers, with POPE: each reward applies to the rows that have its column."""
    config = GRPOConfig(
        folder, max_steps=steps, per_device_train_batch_size=128, num_generations=8, learning_rate=3e-4,
        lr_scheduler_type="linear", beta=0.0, max_completion_length=LONGEST, seed=seed, **QUIET,
    )  # fmt: skip
    rows = concatenate_datasets([prompt_rows(500), question_rows(500)])
    return _train(GRPOTrainer, model, config, rows, reward_funcs=[ChairReward(THINGS), pope_reward])


def run(*, seed: int = 0, steps: tuple[int, int, int] = (600, 60, 250), count: int = 200) -> dict[str, Measured]:
    """Measure CHAIR, POPE and colours after SFT, and after DPO and GRPO, which both start from the SFT model."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        imitator = imitate(make_model(seed), folder, steps=steps[0], seed=seed)
        measured = {"SFT": show("SFT", evaluate(imitator, count=count))}
        for name, stage, number in (("DPO", prefer, steps[1]), ("GRPO", reinforce, steps[2])):
            torch.manual_seed(seed)
            model = stage(copy.deepcopy(imitator), folder, steps=number, seed=seed)
            measured[name] = show(name, evaluate(model, count=count))
    return measured


def show(name: str, measured: Measured) -> Measured:
    """Print the metrics of a stage, and return them."""
    print(f"{name:5}", *(f"{key} {value:.3f} " for key, value in measured.numbers().items()), flush=True)
    return measured


def write(measured: dict[str, Measured], folder: Path) -> None:
    """Write the metrics, a plot of them, and ten held-out pictures with each stage's captions and the true ones."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: each.numbers() for name, each in measured.items()}
    (folder / "measured.json").write_text(json.dumps(numbers, indent=2) + "\n")
    bars(numbers).save(folder / "measured.png")
    shown = prompt_rows(10, seed=5, held_out=True)
    said = {name: each.captions[:10] for name, each in measured.items()}
    said["truth"] = [caption(things) for things in shown["objects"]]
    sheet(shown["images"], said).save(folder / "captions.png")
    for i in range(10):
        print("", *(f"{name:5} {texts[i]}" for name, texts in said.items()), sep="\n")


def real(model: str, dataset: str, folder: str, *, max_pixels: int) -> None:
    """DPO of a model from the hub, with an adapter, on rows of `question, image, chosen, rejected`."""
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
    write(run(seed=args.seed), Path(args.output_dir))


if __name__ == "__main__":
    main()
