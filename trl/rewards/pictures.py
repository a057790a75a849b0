"""Reward functions for images: `(prompts, images, **columns) -> rewards`.

`images` is a tensor `[b,3,H,W]` in [0, 1]; a function with an argument `pil_images` is passed Pillow images.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trl.errors import ConfigError
from trl.rewards.images import to_pil
from trl.rewards.reward import Reward, Samples, make_rewards
from trl.rewards.signature import PICTURES, check_arguments, say_hidden


@dataclass(frozen=True)
class PictureSamples(Samples):
    """Images to be rewarded, with their prompts; `images` is a column, and `completions` are names for error messages."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[str],
        images: Tensor,
        rewards: Sequence[Reward],
        columns: Mapping[str, Sequence[Any]],
        extras: Mapping[str, Any],
    ) -> PictureSamples:
        """The images, with Pillow images as well if one of `rewards` has an argument `pil_images`."""
        wanted = any("pil_images" in inspect.signature(reward.function).parameters for reward in rewards)
        size = f"{images.shape[-1]} × {images.shape[-2]}"
        named = [f"picture {i}, {size} pixels" for i in range(1, len(images) + 1)]
        pil = {"pil_images": to_pil(images)} if wanted else {}
        return cls(prompts, named, {**columns, "images": images, **pil}, extras)

    @property
    def keywords(self) -> dict[str, Any]:
        return {**self.columns, "prompts": self.prompts, **self.extras}


def make_picture_rewards(reward_funcs: Any, *, weights: Sequence[float] | None, columns: Sequence[str]) -> list[Reward]:
    """Make one or several reward functions for images; `columns` are those of the dataset besides prompts.

    Raises ConfigError for a value that is not a function, and for a function with an argument that it will not be passed.
    """
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for each in given:
        if isinstance(each, str | nn.Module):
            raise ConfigError(
                f"reward_funcs holds {each if isinstance(each, str) else type(each).__name__!r}: give a function of "
                "(prompts, images, **columns), such as trl.rewards.get_aesthetic_reward() or get_clip_reward()."
            )
    rewards = make_rewards(reward_funcs, weights=weights)
    say_hidden(columns, PICTURES)
    for reward in rewards:
        check_arguments(reward.name, reward.function, columns, PICTURES)
    return rewards
