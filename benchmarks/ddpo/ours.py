"""The same losses and epochs as `classic.py`, by this library: `python ours.py FOLDER BATCH`, after it."""

from __future__ import annotations

import random
import sys
import time

import torch

from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

STEPS, PICTURES = 8, 16


def options(batch: int) -> dict:
    """Those of `classic.py`."""
    return {
        "sample_num_steps": STEPS,
        "sample_batch_size": batch,
        "sample_num_batches_per_epoch": PICTURES // batch,
        "train_batch_size": batch,
        "train_gradient_accumulation_steps": PICTURES // batch,
        "sample_guidance_scale": 3.0,
        "train_learning_rate": 1e-4,
        "mixed_precision": "no",
        "save_freq": 1000,
    }


def prompt() -> tuple[str, dict]:
    return random.choice(["a red circle", "a blue circle"]), {}


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}


def gradient_norm(model: torch.nn.Module) -> float:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()


def move(model: torch.nn.Module) -> None:
    """As `classic.py` does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def main(folder: str, batch: int) -> None:
    torch.set_num_threads(1)
    pipeline = DefaultDDPOStableDiffusionPipeline(folder, use_lora=False)
    pipeline.set_progress_bar_config(disable=True)
    trainer = DDPOTrainer(DDPOConfig(**options(batch), logdir=f"{folder}/logs"), brightness, prompt, pipeline)
    trainer.step(0, 0)
    spent = []
    for epoch in range(3):
        started = time.process_time()
        trainer.step(0, 1 + epoch)
        spent.append(round(time.process_time() - started, 2))
    print("CPU seconds of epochs, here:", spent)
    state = torch.load(f"{folder}/classic.pt", weights_only=False)
    trainer.model.load_state_dict(state["weights"])
    move(trainer.model)
    print("step  loss here, there              (log ratio)²/2 here, there      gradient norm here, there")
    names = ("latents", "timesteps", "next_latents", "log_probs")
    for t, (loss_there, kl_there, norm_there) in enumerate(state["found"]):
        trainer.model.zero_grad()
        step = (state["sampled"][name][:, t] for name in names)
        loss, kl, _ = trainer.calculate_loss(*step, state["advantages"], state["embeds"])
        loss.backward()
        norm = gradient_norm(trainer.model)
        print(
            f"{t:4}  {loss.item():.7f}, {loss_there:.7f}   {kl.item():.3e}, {kl_there:.3e}   {norm:.6f}, {norm_there:.6f}"
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
