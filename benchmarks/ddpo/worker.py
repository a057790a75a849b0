"""One side of `compare.py`, by whichever `trl` this interpreter has: its classic `DDPOTrainer` on a small pipeline.

python worker.py make FOLDER             write the pipeline
python worker.py sample FOLDER           write trajectories, and weights that have moved away from those that sampled them
python worker.py losses FOLDER OUT       loss, (log ratio)² / 2 and gradient norm of every step of those trajectories
python worker.py epochs FOLDER OUT BATCH   seconds of epochs that sample and train in batches of BATCH pictures
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from material import GUIDANCE, PICTURES, STEPS, brightness, options, prompt, save_pipeline

EPOCHS = 3
ADVANTAGES = [1.0, -0.5, 2.0, 0.25]
PARTS = ("torch", "transformers", "diffusers", "accelerate", "peft", "trl")


def make_trainer(folder: Path, batch: int) -> Any:
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    torch.manual_seed(0)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=False)
    pipeline.set_progress_bar_config(disable=True)
    return DDPOTrainer(DDPOConfig(**options(batch), logdir=str(folder / "logs")), brightness, prompt, pipeline)


def sample(folder: Path) -> None:
    """Trajectories of 4 pictures by the pipeline's own call, which both libraries have, and moved weights."""
    trainer = make_trainer(folder, 4)
    pipeline = trainer.sd_pipeline
    prompts = ["a red circle", "a blue circle"] * 2
    positive, negative = (embed(pipeline, texts) for texts in (prompts, [""] * 4))
    guided = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "eta": 1.0}
    with torch.no_grad():
        found = pipeline(prompt_embeds=positive, negative_prompt_embeds=negative, **guided, output_type="pt")
    state = {
        "latents": torch.stack(list(found.latents)),
        "logprobs": torch.stack(list(found.log_probs)),
        "timesteps": pipeline.scheduler.timesteps.clone(),
        "embeds": torch.cat([negative, positive]),
        "weights": moved(pipeline.unet),
    }
    torch.save(state, folder / "sampled.pt")


def embed(pipeline: Any, texts: list[str]) -> torch.Tensor:
    ids = pipeline.tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder(ids)[0]


def moved(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights away from the policy that sampled, so that ratios are not 1."""
    generator = torch.Generator().manual_seed(5)
    return {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in module.state_dict().items()}


def losses(folder: Path) -> list[list[float]]:
    trainer, state = make_trainer(folder, 4), torch.load(folder / "sampled.pt", weights_only=False)
    trainer.sd_pipeline.scheduler.set_timesteps(STEPS)
    unet = trainer.sd_pipeline.unet
    unet.load_state_dict(state["weights"])
    advantages, found = torch.tensor(ADVANTAGES), []
    for t in range(STEPS):
        unet.zero_grad()
        latents, following, logprobs = state["latents"][t], state["latents"][t + 1], state["logprobs"][t]
        timesteps = state["timesteps"][t].expand(4)
        loss, kl, _ = trainer.calculate_loss(latents, timesteps, following, logprobs, advantages, state["embeds"])
        loss.backward()
        gradients = [p.grad.flatten() for p in unet.parameters() if p.grad is not None]
        found.append([loss.item(), kl.item(), torch.cat(gradients).norm().item()])
    return found


def epochs(folder: Path, batch: int) -> dict[str, list[float]]:
    """Seconds of `EPOCHS` epochs after one that is not counted: of this process's processor, and by the clock."""
    trainer = make_trainer(folder, batch)
    trainer.step(0, 0)
    found: dict[str, list[float]] = {"cpu": [], "wall": []}
    for epoch in range(EPOCHS):
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.step(0, 1 + epoch)
        found["cpu"].append(time.process_time() - cpu)
        found["wall"].append(time.perf_counter() - wall)
    return found


def main(task: str, folder: Path, out: Path | None = None, batch: int = PICTURES) -> None:
    torch.set_num_threads(1)
    if task == "make":
        save_pipeline(str(folder))
    elif task == "sample":
        sample(folder)
    else:
        found = {"losses": losses(folder)} if task == "losses" else {"seconds": epochs(folder, batch)}
        versions = {name: importlib.metadata.version(name) for name in PARTS}
        out.write_text(json.dumps({**found, "versions": versions}))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0], Path(given[1]), *map(Path, given[2:3]), *map(int, given[3:4]))
