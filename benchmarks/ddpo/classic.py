"""DDPO of trl 0.11.4 on a small pipeline: losses of stored trajectories, and the time of an epoch. Run before `ours.py`.

    python classic.py FOLDER BATCH      in an environment with trl==0.11.4 and the releases it needs

Measured with transformers 4.46.3, diffusers 0.31.0, accelerate 0.34.2, peft 0.13.2 and torch 2.13.
"""

from __future__ import annotations

import random
import sys
import time

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

STEPS, PICTURES = 8, 16
WORDS = ["<pad>", "<unk>", "<start>", "<end>", "a", "red", "blue", "circle"]


def options(batch: int) -> dict:
    """Of an epoch of 16 pictures that is one optimizer step."""
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


def save_pipeline(folder: str) -> None:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=8, **special)
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    text = CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=2, eos_token_id=3, pad_token_id=0))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, **nothing).save_pretrained(folder)


def gradient_norm(model: torch.nn.Module) -> float:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()


def move(model: torch.nn.Module) -> None:
    """Away from the policy that sampled, so that ratios are not 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def epochs(trainer, count: int = 3) -> list[float]:
    """CPU seconds of each of `count` epochs, after one that is not counted."""
    trainer.step(0, 0)
    found = []
    for epoch in range(count):
        started = time.process_time()
        trainer.step(0, 1 + epoch)
        found.append(time.process_time() - started)
    return found


def main(folder: str, batch: int) -> None:
    torch.set_num_threads(1)
    save_pipeline(folder)
    pipeline = DefaultDDPOStableDiffusionPipeline(folder, use_lora=False)
    pipeline.set_progress_bar_config(disable=True)
    trainer = DDPOTrainer(DDPOConfig(**options(batch), logdir=f"{folder}/logs"), brightness, prompt, pipeline)
    print("CPU seconds of epochs, trl 0.11.4:", [round(seconds, 2) for seconds in epochs(trainer)])
    (sampled, *_), _ = trainer._generate_samples(iterations=1, batch_size=4)
    kept = {name: value for name, value in sampled.items() if hasattr(value, "shape")}
    advantages = torch.tensor([1.0, -0.5, 2.0, 0.25])
    embeds = torch.cat([trainer.neg_prompt_embed.repeat(4, 1, 1), kept["prompt_embeds"]])
    weights = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    move(pipeline.unet)
    found = []
    for t in range(STEPS):
        pipeline.unet.zero_grad()
        names = ("latents", "timesteps", "next_latents", "log_probs")
        loss, kl, _ = trainer.calculate_loss(*(kept[name][:, t] for name in names), advantages, embeds)
        loss.backward()
        found.append((loss.item(), kl.item(), gradient_norm(pipeline.unet)))
    state = {"sampled": kept, "advantages": advantages, "embeds": embeds, "found": found, "weights": weights}
    torch.save(state, f"{folder}/classic.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
