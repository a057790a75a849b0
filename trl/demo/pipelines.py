"""Diffusion pipelines small enough for two CPU cores: the architectures of the large ones, with random weights.

Their tokenizer has one token per given word; other words become the unknown token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from trl.imports import require

LENGTH = 8
"""Maximum tokens of a prompt."""
WIDTH = 32
"""Hidden size of the text encoders."""
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of `words`."""
    known = [*SPECIAL.values(), *dict.fromkeys(words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )


def tiny_vae(*, channels: int = 4, width: int = 16) -> Any:
    """An autoencoder whose latents have half the height and width of the pictures."""
    diffusers = require("diffusers", to="A diffusion pipeline")
    return diffusers.AutoencoderKL(
        block_out_channels=(width, 2 * width),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def clip_text(tokenizer: PreTrainedTokenizerFast, *, projected: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_text(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    shape = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)).eval()


def tiny_stable_diffusion(
    words: Sequence[str], *, width: int = 32, prediction: str = "epsilon", spacing: str = "leading", seed: int = 0
) -> Any:
    """A `StableDiffusionPipeline` for pictures of 16 pixels; about a million parameters in its UNet at width 32.

    Its UNet predicts the noise, or v with "v_prediction", as in Stable Diffusion 2. The timestep `spacing` is "leading"
    as there, or "trailing", which starts at pure noise for any number of steps (arXiv:2305.08891).
    """
    diffusers = require("diffusers", to="A diffusion pipeline")
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(words)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # in a UNet, this is the number of heads
        norm_num_groups=8,
    )
    return diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
            timestep_spacing=spacing,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_stable_diffusion_3(words: Sequence[str], *, layers: int = 2, heads: int = 4, seed: int = 0) -> Any:
    """A `StableDiffusion3Pipeline` for pictures of 16 pixels."""
    diffusers = require("diffusers", to="A diffusion pipeline")
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(words)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        caption_projection_dim=16 * heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=tiny_vae(),
        text_encoder=clip_text(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(tokenizer, projected=True),
        tokenizer_2=tokenizer,
        text_encoder_3=t5_text(tokenizer),
        tokenizer_3=tokenizer,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
