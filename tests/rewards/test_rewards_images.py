"""Rewards of pictures: numbers worked by hand, gradients, and what cannot be rewarded."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from trl.demo.pipelines import word_tokenizer
from trl.errors import ConfigError, ModelNotFoundError
from trl.rewards import (
    brightness_reward,
    get_aesthetic_reward,
    get_clip_reward,
    get_color_reward,
    get_hue_reward,
    jpeg_compressibility_reward,
    jpeg_incompressibility_reward,
)
from trl.rewards.clip import aesthetic_head, clip_pixels
from trl.rewards.images import to_pil
from trl.rewards.pictures import make_picture_rewards


def plain(*channels, size=8):
    """A picture of one colour, `[1,3,size,size]`."""
    return torch.tensor(channels).view(1, 3, 1, 1).expand(1, 3, size, size).clone()


def test_noise_compresses_worse_than_a_plain_picture():
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    flat, noisy = jpeg_incompressibility_reward(torch.cat([plain(0.5, 0.5, 0.5, size=32), noise]))
    assert 0.1 < flat < 1 < noisy
    assert jpeg_compressibility_reward(noise) == [-noisy]


def test_brightness_and_distance_to_a_colour():
    assert brightness_reward(plain(0.2, 0.4, 0.6)).tolist() == pytest.approx([0.4])
    assert get_color_reward("red")(plain(1.0, 0.0, 0.0)).tolist() == [1]
    assert get_color_reward((0.5, 0.5, 0.5))(plain(0.5, 0.2, 0.5)).tolist() == pytest.approx([0.9])


def test_shares_of_a_hue():
    half = torch.cat([plain(1.0, 0.0, 0.0), plain(0.0, 1.0, 0.0)], -1)  # red beside green
    assert get_hue_reward("red")(half).tolist() == pytest.approx([0.5 / 1.01])
    assert get_hue_reward("yellow")(plain(1.0, 0.5, 0.0)).tolist() == pytest.approx([0.5 / 1.01])
    assert get_hue_reward("red")(plain(0.5, 0.5, 0.5)).tolist() == [0]


@pytest.mark.parametrize("reward", [brightness_reward, get_color_reward("blue"), get_hue_reward("cyan")])
def test_gradients_reach_the_pictures(reward):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    reward(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_pictures_of_pillow():
    (picture,) = to_pil(plain(1.0, 0.5, 0.0))
    assert (picture.size, picture.getpixel((0, 0))) == ((8, 8), (255, 128, 0))


def test_colours_that_nobody_knows():
    with pytest.raises(ConfigError, match="Unknown color 'rot'"):
        get_color_reward("rot")
    with pytest.raises(ConfigError, match="three numbers"):
        get_color_reward((1.0, 2.0))
    with pytest.raises(ConfigError, match="Unknown color 'white'"):
        get_hue_reward("white")


# ---- CLIP ----

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4, "projection_dim": 12}


def test_a_picture_fits_its_prompt_by_clip():
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["red", "blue"])
    text = {**VISION, "vocab_size": len(tokenizer), "max_position_embeddings": 8}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12))
    reward = get_clip_reward(model, tokenizer)
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    found = reward(["red", "blue"], images)
    alone = torch.cat([reward([prompt], images[i : i + 1]) for i, prompt in enumerate(["red", "blue"])])
    assert torch.allclose(found, alone, atol=1e-5)
    assert found.abs().max() <= model.logit_scale.exp()
    found.sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [get_clip_reward, get_aesthetic_reward])
def test_a_model_of_a_reward_that_is_nowhere(make):
    with pytest.raises(ModelNotFoundError, match=r"^model='\./no': there is no such folder"):
        make("./no")


def test_an_aesthetic_predictor(tmp_path):
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    head = aesthetic_head(12)
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.pth")
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = get_aesthetic_reward(model, str(tmp_path / "head.pth"))(images)
    assert found.shape == (3,)
    assert torch.allclose(found, get_aesthetic_reward(model, head)(images))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="include '0.weight'"):
        get_aesthetic_reward(model, str(tmp_path / "other.pth"))
    with pytest.raises(ConfigError, match="no such file"):
        get_aesthetic_reward(model, str(tmp_path / "none.pth"))


def test_pixels_of_clip():
    """A plain picture stays plain; its value is normalised by the mean and deviation that CLIP was trained with."""
    found = clip_pixels(plain(0.5, 0.5, 0.5, size=20), 8)
    assert found.shape == (1, 3, 8, 8)
    expected = (0.5 - 0.48145466) / 0.26862954
    assert torch.allclose(found[:, 0], torch.full((1, 8, 8), expected), atol=1e-5)


# ---- as functions of a trainer ----


def nothing(extra=None):
    return []


def test_functions_that_pictures_cannot_be_given_to():
    with pytest.raises(ConfigError, match="takes none of prompts, images, pil_images"):
        make_picture_rewards(nothing, weights=None, columns=[])
    with pytest.raises(ConfigError, match="has the argument 'target'"):
        make_picture_rewards(lambda images, target: [], weights=None, columns=["label"])
