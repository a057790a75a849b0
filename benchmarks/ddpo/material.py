"""A small Stable Diffusion, and what DDPO is asked to do with it: read by both sides, so by old and new releases."""

from __future__ import annotations

import random
from typing import Any

import torch

STEPS, PICTURES = 8, 16
"""Denoising steps of a picture, and pictures of an epoch."""
GUIDANCE = 3.0
WORDS = ["<pad>", "<unk>", "<start>", "<end>", "a", "red", "blue", "circle"]


def save_pipeline(folder: str) -> None:
    """Write a pipeline for pictures of 16 pixels: random weights, about a million parameters in its UNet."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

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


def options(batch: int) -> dict[str, Any]:
    """Of `DDPOConfig`: an epoch that is one optimizer step, sampled and trained on in batches of `batch` pictures."""
    return {
        "sample_num_steps": STEPS,
        "sample_batch_size": batch,
        "sample_num_batches_per_epoch": PICTURES // batch,
        "train_batch_size": batch,
        "train_gradient_accumulation_steps": PICTURES // batch,
        "sample_guidance_scale": GUIDANCE,
        "train_learning_rate": 1e-4,
        "mixed_precision": "no",
        "save_freq": 1000,
    }


def prompt() -> tuple[str, dict]:
    return random.choice(["a red circle", "a blue circle"]), {}


def brightness(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    return images.mean((1, 2, 3)), {}
