"""Small diffusion models learn what to draw: a reward moves from what drawings have to what it can be."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from trl.demo.drawings import PLAIN, make_pipeline
from trl.diffusion.rollouts import seed_of
from trl.rewards.images import get_hue_reward
from trl.trainers.diffusion.batch_ddpo import DiffusionDDPOConfig, DiffusionDDPOTrainer
from trl.trainers.diffusion.grpo import DiffusionGRPOConfig, DiffusionGRPOTrainer

pytestmark = pytest.mark.long

OPTIONS = {
    "guidance_scale": 1.0,
    "num_inference_steps": 5,
    "num_inference_steps_eval": 8,
    "per_device_train_batch_size": 48,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "num_pictures": 0,
    "html_report": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
REWARD = get_hue_reward("red")


def mean_reward(run):
    """Of 32 pictures from noise that training has not seen."""
    prompts = [*PLAIN] * 16
    seeds = [seed_of(1000, 0, i) for i in range(len(prompts))]
    return REWARD(run.draw(prompts, seeds, run.evaluation_schedule())[1]).mean().item()


@pytest.fixture(scope="module")
def vae():
    """An autoencoder of drawings, which both models share."""
    return make_pipeline("flow", vae_steps=100, steps=1).vae


@pytest.mark.parametrize(
    ("kind", "trainer", "config", "options"),
    [
        ("flow", DiffusionGRPOTrainer, DiffusionGRPOConfig, {"max_sequence_length": 8, "max_steps": 10}),
        (
            "unet",
            DiffusionDDPOTrainer,
            DiffusionDDPOConfig,
            {"max_steps": 10, "learning_rate": 3e-4, "timestep_fraction": 0.8},
        ),
    ],
)
def test_a_colour_is_learned(tmp_path, vae, kind, trainer, config, options):
    torch.manual_seed(0)
    pipeline = make_pipeline(kind, vae=vae, steps=150, **({"width": 16} if kind == "unet" else {}))
    args = config(output_dir=str(tmp_path), **{**OPTIONS, **options})
    run = trainer(pipeline, REWARD, args, Dataset.from_dict({"prompt": [*PLAIN] * 4}))
    before = mean_reward(run)
    run.train()
    after = mean_reward(run)
    assert before < 0.45  # one drawing in four is red
    assert after > before + 0.25
