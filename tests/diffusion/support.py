"""What tests of diffusion trainers share: options for short runs, and one way to make a trainer."""

from __future__ import annotations

import math

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.diffusion.pipelines import PIPELINES, PROMPTS
from trl.rewards.images import brightness_reward

ROWS = Dataset.from_dict({"prompt": ["a red circle", "a blue square", "a green circle", "a circle"]})
OPTIONS = {
    "height": 16,
    "width": 16,
    "num_inference_steps_eval": 2,
    "guidance_scale": 1.5,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "bf16": False,
    "logging_steps": 1,
    "num_pictures": 0,
    "html_report": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
ROLLOUTS = {**OPTIONS, "num_inference_steps": 3, "num_generations": 2}
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])


def pipeline_of(name):
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def options_for(name):
    return {"max_sequence_length": 8} if name in ("sd3", "flux", "schnell") else {}


def online(
    trainer_class, folder, name="sd3", *, pipeline=None, reward=brightness_reward, lora=True, rows=ROWS, **options
):
    """A trainer that samples, on a tiny pipeline of the family `name`."""
    args = trainer_class.config_class(output_dir=str(folder), **{**ROLLOUTS, **options_for(name), **options})
    torch.manual_seed(0)
    return trainer_class(
        model=pipeline_of(name) if pipeline is None else pipeline,
        reward_funcs=reward,
        args=args,
        train_dataset=rows,
        peft_config=LORA if lora else None,
    )


def pairs(count=8):
    """Rows of two pictures: white is preferred to noise."""
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict(
        {
            "prompt": [PROMPTS[i % 2] for i in range(count)],
            "chosen": [torch.ones(3, 16, 16).tolist()] * count,
            "rejected": torch.rand(count, 3, 16, 16, generator=generator).tolist(),
        }
    )


def weights_of(run):
    return torch.cat([p.detach().flatten() for p in run.module.parameters() if p.requires_grad])


class Poison(TrainerCallback):
    """Makes the losses of some steps NaN."""

    def __init__(self, run, at):
        plain = run.loss

        def loss(model, batch):
            value, metrics = plain(model, batch)
            return (value * math.nan if run.state.global_step in at else value), metrics

        run.loss = loss
