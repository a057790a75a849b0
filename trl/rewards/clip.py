"""Rewards for images by CLIP (arXiv:2103.00020): how well they fit their prompt, and how people would rate them.

    clip        s · cos(f(image), g(prompt))          PickScore (arXiv:2305.01569): the same, trained on human preferences
    aesthetic   h(f(image) / ‖f(image)‖)              h a small network on the embedding: the LAION aesthetic predictor

Images `[b,3,H,W]` in [0, 1] are resized and normalised as tensors, so that the rewards are differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from trl.errors import ConfigError
from trl.models.not_found import explain_missing

if TYPE_CHECKING:
    from transformers import CLIPModel

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training pixels, for red, green and blue."""

PICKSCORE = "yuvalkirstain/PickScore_v1"
AESTHETIC = "openai/clip-vit-large-patch14"
HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
"""Repository and file of the network on top of CLIP's embedding."""


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Pixel values `[b,3,size,size]` for CLIP: the shorter side scaled to `size`, cropped at the centre, normalised."""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    scaled = [max(size, round(side * scale)) for side in (height, width)]
    images = F.interpolate(images.float(), scaled, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = ((side - size) // 2 for side in scaled)
    images = images[..., top : top + size, left : left + size]
    mean, deviation = (torch.tensor(each).to(images)[:, None, None] for each in (MEAN, DEVIATION))
    return (images - mean) / deviation


def _loaded(kind: Any, name: str) -> Any:
    with explain_missing(name):
        return kind.from_pretrained(name)


class ClipReward:
    """How well an image fits its prompt, by a CLIP model: the logit s · cos, with the model's learned scale s.

    model       a `CLIPModel`, or the name or folder of one; PickScore's by default
    tokenizer   its tokenizer; None: loaded with the model
    """

    def __init__(self, model: str | CLIPModel = PICKSCORE, tokenizer: Any = None) -> None:
        from transformers import AutoTokenizer, CLIPModel

        if not isinstance(model, str) and tokenizer is None:
            raise ConfigError(
                "The model is given as an object: give its tokenizer too, get_clip_reward(model, tokenizer)."
            )
        name = model if isinstance(model, str) else model.config._name_or_path
        self.model = _loaded(CLIPModel, model) if isinstance(model, str) else model
        self.tokenizer = _loaded(AutoTokenizer, name) if tokenizer is None else tokenizer
        self.model.requires_grad_(False).eval()
        self.__name__ = "pickscore" if name == PICKSCORE else "clip_reward"

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        self.model.to(images.device)
        length = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(
            [*prompts], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(images.device)
        pixels = clip_pixels(images, self.model.config.vision_config.image_size).to(self.model.dtype)
        found = self.model(pixel_values=pixels, input_ids=text["input_ids"], attention_mask=text["attention_mask"])
        return found.logits_per_image.diagonal().float()


class AestheticReward:
    """How people would rate an image, about 1 to 10: a small network on CLIP's normalised embedding.

    model   a `CLIPVisionModelWithProjection`, or the name or folder of one
    head    the network: an `nn.Module`, a file with its weights, or None for the one that classic scripts used, from the hub
    """

    __name__ = "aesthetic"

    def __init__(self, model: str | nn.Module = AESTHETIC, head: str | nn.Module | None = None) -> None:
        from transformers import CLIPVisionModelWithProjection

        self.model = _loaded(CLIPVisionModelWithProjection, model) if isinstance(model, str) else model
        self.head = head if isinstance(head, nn.Module) else load_aesthetic_head(head)
        for part in (self.model, self.head):
            part.requires_grad_(False).eval()

    def __call__(self, images: Tensor) -> Tensor:
        self.model.to(images.device)
        self.head.to(images.device)
        pixels = clip_pixels(images, self.model.config.image_size).to(self.model.dtype)
        return self.head(F.normalize(self.model(pixel_values=pixels).image_embeds.float(), dim=-1)).squeeze(-1)


def aesthetic_head(width: int = 768) -> nn.Sequential:
    """The network of the LAION aesthetic predictor (V2): five linear layers with dropout, and no activation functions."""
    sizes = (width, 1024, 128, 64, 16, 1)
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    dropout = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    return nn.Sequential(linear[0], dropout[0], linear[1], dropout[1], linear[2], dropout[2], linear[3], linear[4])


def load_aesthetic_head(file: str | None) -> nn.Sequential:
    """The network with weights from a file (`.pth` or `.safetensors`), or from the hub.

    Raises ConfigError for a file that does not exist or has other weights.
    """
    if file is None:
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(*HEAD)
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"head={file!r}: there is no such file. Give the weights of an aesthetic predictor.")
    state = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, map_location="cpu")
    )
    state = {name.removeprefix("layers."): value for name, value in state.items()}
    if "0.weight" not in state:
        raise ConfigError(
            f"head={file!r} has the weights {', '.join([*state][:3])}, …: those of an aesthetic predictor include '0.weight'."
        )
    head = aesthetic_head(state["0.weight"].shape[1])
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"head={file!r} has other layers than an aesthetic predictor: {', '.join(state)}.") from error
    return head


get_clip_reward = ClipReward
get_aesthetic_reward = AestheticReward
