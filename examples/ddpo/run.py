"""Pre-train a small diffusion model on drawings, then fine-tune it: `python run.py --method ddpo|grpo|nft|dpo`.

    ddpo   a UNet shaped as Stable Diffusion 2, DDPO             ┐ reward: the fraction of a picture's colour that is red, for
    grpo   a transformer shaped as Stable Diffusion 3, Flow-GRPO │ prompts without a colour (--reward jpeg: compression)
    nft    the same transformer, DiffusionNFT                   ┘
    dpo    the same transformer, Diffusion-DPO                     pairs: red and yellow preferred to green and blue

--model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 runs DDPO on a real model, with an aesthetic reward.
"""

from __future__ import annotations

import argparse
import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from trl import (
    DiffusionDDPOConfig,
    DiffusionDDPOTrainer,
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    write_report,
)
from trl.demo.drawings import DRAWN, PLAIN, draw, make_pipeline
from trl.diffusion.rollouts import seed_of
from trl.diffusion.trajectories import step_of
from trl.ops.gaussian import gaussian_kl
from trl.rewards import get_aesthetic_reward, get_hue_reward, jpeg_compressibility_reward
from trl.trainers.diffusion.grpo import first_steps

KINDS = {"ddpo": "unet", "grpo": "flow", "nft": "flow", "dpo": "flow"}
SHAPES = {"unet": {"width": 16}, "flow": {}}
NOISE = {"unet": 1.0, "flow": 0.7}
TEXT = {"unet": {}, "flow": {"max_sequence_length": 8}}
PREFERRED = ("red", "yellow")
ANIMALS = ["cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion"]

COMMON = {
    "guidance_scale": 1.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "num_inference_steps_eval": 10,
    "num_pictures": 16,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
ONLINE = {"num_inference_steps": 6, "per_device_train_batch_size": 64, "num_generations": 8}
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ddpo": (
        DiffusionDDPOTrainer,
        DiffusionDDPOConfig,
        {**ONLINE, "learning_rate": 3e-4, "max_steps": 16, "timestep_fraction": 0.9},
    ),
    "grpo": (
        DiffusionGRPOTrainer,
        DiffusionGRPOConfig,
        {**ONLINE, "learning_rate": 1e-3, "max_steps": 16, "beta": 0.01},
    ),
    "nft": (
        DiffusionNFTTrainer,
        DiffusionNFTConfig,
        {**ONLINE, "learning_rate": 1e-3, "max_steps": 12},
    ),
    "dpo": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig,
        {"per_device_train_batch_size": 32, "learning_rate": 5e-4, "beta": 500.0, "max_steps": 40},
    ),
}
"""Trainer, its configuration class, and options."""


class Curve(TrainerCallback):
    """Prints the reward, or the accuracy on pairs, of each step; `points` are (step, value, distance to the reference)."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float | None]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        value = logs.get("reward", logs.get("rewards/accuracies"))
        if value is not None:
            distance = logs.get("kl", logs.get("ref_distance"))
            self.points.append((state.global_step, value, distance))
            far = "" if distance is None else f"   {distance:.4f} from the reference"
            print(f"step {state.global_step:4}   {value:7.3f} {'█' * round(40 * max(0.0, value))}{far}", flush=True)


def main() -> None:
    arguments = parse()
    if arguments.model_name_or_path:
        train_a_real_model(arguments)
        return
    started = time.process_time()
    pipeline = small_pipeline(arguments)
    drawn = time.process_time() - started
    trainer, curve = make_trainer(arguments, pipeline), Curve()
    trainer.add_callback(curve)
    first = deepcopy(trainer.module)
    measure = share_preferred if arguments.method == "dpo" else mean_reward
    before = measure(trainer, arguments)
    started = time.process_time()
    trainer.train()
    spent = time.process_time() - started
    after = measure(trainer, arguments)
    found = {
        "method": arguments.method,
        "reward": arguments.reward,
        "seed": arguments.seed,
        "before": before,
        "after": after,
        "kl": divergence(trainer, first, arguments),
        "steps": trainer.state.global_step,
        "cpu_seconds": spent,
        "curve": curve.points,
    }
    folder = Path(trainer.args.output_dir)
    (folder / "result.json").write_text(json.dumps(found))
    print(f"{arguments.method} seed {arguments.seed}: {before:.3f} → {after:.3f} in {found['steps']} steps,", end=" ")
    print(
        f"KL {found['kl']:.3f}, {spent:.0f} s of CPU ({drawn:.0f} s to learn drawing). Pictures: {write_report(folder)}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="grpo")
    parser.add_argument("--reward", choices=["hue", "jpeg"], default="hue")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps; by default as many as the method needs")
    parser.add_argument("--output_dir", default="ddpo-output")
    parser.add_argument(
        "--pipeline_dir", help="folder to save the small pipeline in, and to load it from in later runs"
    )
    parser.add_argument("--model_name_or_path", help="a Stable Diffusion model, to train on the aesthetic reward")
    return parser.parse_args()


# ---- the small pipeline ----


def small_pipeline(arguments: argparse.Namespace) -> Any:
    """The pre-trained small pipeline, loaded from `--pipeline_dir` if it is there, else trained now."""
    kind = KINDS[arguments.method]
    folder = Path(arguments.pipeline_dir) / kind if arguments.pipeline_dir else None
    if folder is None or not folder.is_dir():
        pipeline = make_pipeline(kind, seed=0, **SHAPES[kind])
        if folder is None:
            return pipeline
        pipeline.save_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_trainer(arguments: argparse.Namespace, pipeline: Any) -> Any:
    trainer_class, config_class, options = METHODS[arguments.method]
    if arguments.steps:
        options = {**options, "max_steps": arguments.steps}
    options = {**COMMON, **options, **TEXT[KINDS[arguments.method]], "seed": arguments.seed}
    args = config_class(output_dir=f"{arguments.output_dir}/{arguments.method}-{arguments.seed}", **options)
    if arguments.method == "dpo":
        trainer = trainer_class(pipeline, args, preferences(256, seed=arguments.seed))
    else:
        reward = get_hue_reward("red") if arguments.reward == "hue" else jpeg_compressibility_reward
        trainer = trainer_class(pipeline, reward, args, Dataset.from_dict({"prompt": [*PLAIN] * 4}))
    trainer.remove_callback(PrinterCallback)
    return trainer


def preferences(count: int, *, seed: int) -> Dataset:
    """Pairs of drawings: red or yellow is preferred to green or blue."""
    generator = torch.Generator().manual_seed(seed)
    others = [color for color in DRAWN if color not in PREFERRED]
    rows: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for i in range(count):
        prompt = PLAIN[i % len(PLAIN)]
        rows["prompt"].append(prompt)
        for side, colors in (("chosen", PREFERRED), ("rejected", others)):
            color = colors[i // len(PLAIN) % len(colors)]
            rows[side].append(draw(f"a {color} {prompt.split()[1]}", generator).tolist())
    return Dataset.from_dict(rows)


# ---- evaluation ----


def pictures(trainer: Any, prompts: list[str], seed: int) -> torch.Tensor:
    """A picture of each prompt, from noise that training does not use."""
    seeds = [seed_of(1000 + seed, 0, i) for i in range(len(prompts))]
    return trainer.draw(prompts, seeds, trainer.evaluation_schedule())[1]


def mean_reward(trainer: Any, arguments: argparse.Namespace) -> float:
    images = pictures(trainer, [*PLAIN] * 32, arguments.seed)
    reward = get_hue_reward("red") if arguments.reward == "hue" else jpeg_compressibility_reward
    return torch.as_tensor(reward(images)).mean().item()


def share_preferred(trainer: Any, arguments: argparse.Namespace) -> float:
    """Fraction of pictures of "a circle" and "a square" that are closer to red or yellow than to green or blue."""
    images = pictures(trainer, [*PLAIN] * 64, arguments.seed)
    hues = torch.stack([get_hue_reward(color)(images) for color in DRAWN])
    preferred = torch.tensor([color in PREFERRED for color in DRAWN])
    return preferred[hues.argmax(0)].float().mean().item()


@torch.no_grad()
def divergence(trainer: Any, first: nn.Module, arguments: argparse.Namespace) -> float:
    """Mean exact KL of a denoising step to the model before training, per dimension, on trajectories of the trained model.

    The mean is over the steps that the method trains on; for methods without such steps, over all stochastic ones.
    """
    denoiser, prompts = trainer.denoiser, [*PLAIN] * 16
    schedule = denoiser.schedule(6, eta=NOISE[KINDS[arguments.method]])
    seeds = [seed_of(2000 + arguments.seed, 0, i) for i in range(len(prompts))]
    latents, texts = trainer.draw(prompts, seeds, schedule)[0].latents, trainer.texts(prompts)
    found = []
    share = METHODS[arguments.method][2].get("timestep_fraction", 1.0)
    for t in (schedule.is_stochastic & first_steps(len(schedule), share=share)).nonzero().flatten().tolist():
        step = torch.full((len(prompts),), t)
        (mean, sd), (old, _) = (
            step_of(denoiser, module, latents[:, t], step, texts, schedule) for module in (trainer.module, first)
        )
        found.append(gaussian_kl(mean, old, sd))
    return torch.stack(found).mean().item()


# ---- a real model ----


def train_a_real_model(arguments: argparse.Namespace) -> None:
    """DDPO with the aesthetic reward on prompts of animals, as in the paper; needs a GPU."""
    args = DiffusionDDPOConfig(
        output_dir=arguments.output_dir,
        seed=arguments.seed,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        max_steps=arguments.steps or 400,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        picture_steps=50,
    )
    trainer = DiffusionDDPOTrainer(
        arguments.model_name_or_path,
        get_aesthetic_reward(),
        args,
        Dataset.from_dict({"prompt": ANIMALS}),
        peft_config=LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian"),
    )
    trainer.train()
    trainer.save_model(arguments.output_dir)


if __name__ == "__main__":
    main()
