"""Families: each reproduces its pipeline of diffusers, picture for picture."""

import diffusers
import pytest
import torch

from tests.diffusion.pipelines import PIPELINES, PROMPTS, SIZE, flux, qwen_image, stable_diffusion
from trl.diffusion.families import denoiser_for
from trl.errors import ConfigError, ModelError

GUIDANCE = 2.0
CALLED = {"schnell": "true_cfg_scale", "qwen": "true_cfg_scale"}
"""What pipelines call classifier-free guidance that they were not distilled with."""
WITH_T5 = ("sd3", "flux", "schnell")


def build(name):
    options = {"max_sequence_length": 8} if name in WITH_T5 else {}
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return denoiser_for(pipeline, guidance_scale=GUIDANCE, negative_prompt="a", **SIZE, **options)


@torch.no_grad()
def pictures(denoiser, prompts, noise, steps):
    """Deterministic sampling, by the parts."""
    schedule, latents = denoiser.schedule(steps, eta=0.0), noise
    negative = denoiser.encode_negative() if denoiser.is_guided else None
    texts = denoiser.collate(denoiser.encode(prompts))
    for i in range(steps):
        timesteps = schedule.timesteps[i].float().expand(len(latents))
        output = denoiser.output(denoiser.module, latents, timesteps, texts, negative)
        latents, _ = schedule.transition(latents, output, torch.full((len(latents),), i))
    return denoiser.decode(latents)


@pytest.mark.parametrize("name", PIPELINES)
def test_samples_are_those_of_the_pipeline(name):
    denoiser, prompts = build(name), ["a red circle", "a square"]
    noise = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    options = {CALLED.get(name, "guidance_scale"): GUIDANCE, "negative_prompt": ["a", "a"], **SIZE}
    options |= denoiser.encode_options
    if name == "flux":  # distilled with guidance: it is told the number, and there is nothing to lead away from
        del options["negative_prompt"]
    expected = denoiser.pipeline(prompts, latents=noise, num_inference_steps=3, output_type="pt", **options).images
    found = pictures(denoiser, prompts, noise, 3)
    assert found.shape == (2, 3, 16, 16)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_beside_a_prompt_change_nothing(name):
    denoiser = build(name)
    noise = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    together = pictures(denoiser, ["a", "a red blue circle"], noise, 2)
    alone = pictures(denoiser, ["a"], noise[:1], 2)
    assert torch.allclose(together[:1], alone, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_of_pictures(name):
    """Encoding is the way back of decoding, as far as scaling and packing go."""
    denoiser = build(name)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = denoiser.encode_images(images, at_once=2)
    assert latents.shape == (3, *denoiser.latent_shape)
    raw = denoiser._encode(images)
    assert torch.allclose(denoiser._from_unit(denoiser.unpack(latents)), raw, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "qwen"])
def test_pictures_are_decoded_in_parts(name):
    denoiser = build(name)
    latents = torch.randn(5, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(denoiser.decode(latents, at_once=2), denoiser.decode(latents), atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_forward_process(name):
    """At noise level 0 there is no noise (flow) or hardly any (betas); the target has the latents' shape."""
    denoiser = build(name)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, *denoiser.latent_shape, generator=generator) for _ in range(2))
    noisy, timesteps, target = denoiser.add_noise(clean, noise, torch.tensor([0.0, 0.5]))
    assert torch.allclose(noisy[0], clean[0], atol=0.15)
    assert not torch.allclose(noisy[1], clean[1], atol=0.15)
    assert timesteps.tolist() == [0, 500]
    assert target.shape == clean.shape


def test_a_negative_prompt_is_what_guidance_leads_away_from():
    pipeline = stable_diffusion()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    away = [
        pictures(denoiser_for(pipeline, guidance_scale=4.0, negative_prompt=negative), PROMPTS[:1], noise, 2)
        for negative in (None, "blue")
    ]
    assert not torch.allclose(*away, atol=1e-4)


# ---- bad input ----


def test_pipelines_of_other_kinds():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    ddpm = diffusers.DDPMPipeline(diffusers.UNet2DModel(**blocks), diffusers.DDPMScheduler())
    with pytest.raises(ModelError, match="DDPMPipeline is not supported: give one of StableDiffusionPipeline"):
        denoiser_for(ddpm)


def test_pipelines_without_a_part():
    pipeline = stable_diffusion()
    pipeline.text_encoder = None
    with pytest.raises(ModelError, match="StableDiffusionPipeline has no text_encoder"):
        denoiser_for(pipeline)


@pytest.mark.parametrize("scale", [0, 0.5, float("nan")])
def test_guidance_that_leaves_the_prompt_out(scale):
    with pytest.raises(ConfigError, match=f"guidance_scale={scale}"):
        denoiser_for(stable_diffusion(), guidance_scale=scale)


@pytest.mark.parametrize(("make", "pixels", "step"), [(stable_diffusion, 17, 2), (flux, 18, 4), (qwen_image, 2, 4)])
def test_sizes_that_no_latent_has(make, pixels, step):
    with pytest.raises(
        ConfigError, match=f"{pixels} pixels: this model needs a height and width that are multiples of {step}"
    ):
        denoiser_for(make(), height=pixels, width=16)


def test_models_for_inpainting():
    pipeline = stable_diffusion()
    config = {**pipeline.unet.config, "in_channels": 9}
    pipeline.unet = diffusers.UNet2DConditionModel.from_config(config)
    with pytest.raises(ModelError, match="9 input channels"):
        denoiser_for(pipeline)


def test_options_without_effect():
    with pytest.raises(ConfigError, match="max_sequence_length"):
        denoiser_for(stable_diffusion(), max_sequence_length=8)
