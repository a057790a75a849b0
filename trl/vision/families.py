"""What multimodal architectures read beside tokens, as data: one entry per architecture.

A model whose forward has arguments of its own is made known by an entry for its `model_type`:

    FAMILIES["my_model"] = Family(joins={"token_bias": PerToken()})

and rows then bring the values along in a column `inputs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from transformers import PreTrainedConfig

from trl.errors import DataError
from trl.types import Concatenated, Example, Join, PerToken

EVERY_LAYER = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Family:
    """What the models of an architecture read beside tokens.

    joins         how each input of several prompts is joined, by the name of the forward's argument
    token_types   the per-token input that is 1 at the tokens of images, if there is one
    positions     "text": 0, 1, 2, …; "mrope": time, height and width, where an image advances them by its longer side
                  (arXiv:2409.12191, Section 2.1)
    sees_ahead    which tokens see those behind them: none ("causal"), those of an "image" within it, those of a "prompt"
    in_layers     kinds of layers in which they do
    only_if       an attribute of the text configuration, and the value at which they do
    prompt        how a text prompt and the places of its images make a whole, where templates do not say so
    """

    joins: Mapping[str, Join] = field(default_factory=dict)
    token_types: str | None = None
    positions: Literal["text", "mrope"] = "text"
    sees_ahead: Literal["causal", "image", "prompt"] = "causal"
    in_layers: tuple[str, ...] = EVERY_LAYER
    only_if: tuple[str, str] | None = None
    prompt: str = "{images}{text}"

    def look_ahead(self, config: PreTrainedConfig) -> bool:
        """Whether tokens of a model with this configuration see tokens behind them."""
        if self.only_if is None:
            return self.sees_ahead != "causal"
        name, value = self.only_if
        return config.get_text_config().to_dict().get(name) == value


_TILES = {"pixel_values": Concatenated(), "image_sizes": Concatenated()}
QWEN = Family(
    joins={"pixel_values": Concatenated(), "image_grid_thw": Concatenated(), "mm_token_type_ids": PerToken()},
    token_types="mm_token_type_ids",
    positions="mrope",
)
LLAVA = Family(joins={"pixel_values": Concatenated()})
LLAVA_NEXT = Family(joins=_TILES)
LLAVA_ONEVISION = Family(joins={**_TILES, "batch_num_images": Concatenated()})
GEMMA3 = Family(
    joins={"pixel_values": Concatenated(), "token_type_ids": PerToken(sees_ahead=True)},
    token_types="token_type_ids",
    sees_ahead="image",
)
GEMMA4 = Family(
    joins={
        "pixel_values": Concatenated(),
        "image_position_ids": Concatenated(fill=-1),
        "mm_token_type_ids": PerToken(sees_ahead=True),
    },
    token_types="mm_token_type_ids",
    sees_ahead="image",
    in_layers=("sliding_attention",),
    only_if=("use_bidirectional_attention", "vision"),
)
IDEFICS3 = Family(joins={"pixel_values": Concatenated(1), "pixel_attention_mask": Concatenated(1)})
PALIGEMMA = Family(
    joins={"pixel_values": Concatenated(), "token_type_ids": PerToken(completion=1, padding=1, sees_ahead=True)},
    sees_ahead="prompt",
    prompt="{images}{bos}{text}\n",
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), QWEN),
    **dict.fromkeys(("llava", "internvl"), LLAVA),
    **dict.fromkeys(("llava_next", "mistral3"), LLAVA_NEXT),
    "llava_onevision": LLAVA_ONEVISION,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    **dict.fromkeys(("idefics3", "smolvlm"), IDEFICS3),
    "paligemma": PALIGEMMA,
}
"""Families by the `model_type` of the configuration."""

_NOTHING: Mapping[str, Join] = MappingProxyType({})


def family_of(config: PreTrainedConfig) -> Family | None:
    """What is known of the models of this configuration; None where nothing is."""
    return FAMILIES.get(config.model_type)


def joins_of(config: PreTrainedConfig) -> Mapping[str, Join]:
    """How inputs are joined for models of this configuration; empty where nothing is known of them."""
    family = family_of(config)
    return _NOTHING if family is None else family.joins


def image_token_ids(config: PreTrainedConfig) -> list[int]:
    """Ids of the tokens that stand for images and videos: they are never sampled, and never learned."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    given = (config.__dict__.get(name) for name in names)
    return sorted({token for token in given if isinstance(token, int)})


def check_image_tokens(examples: Sequence[Example], tokens: Collection[int]) -> None:
    """Raises DataError for `tokens` that stand for images in an answer, or in a row without images: forwards would fail, or
    compute wrong numbers."""
    stands = frozenset(tokens)
    for example in examples if stands else ():
        answers = [completion.ids for completion in example.completions]
        if example.prompt and not all(map(stands.isdisjoint, answers)):
            found = next(token for ids in answers for token in ids if token in stands)
            raise DataError(
                f"An answer has token {found}, which stands for an image: images stand in prompts, and samplers ban such tokens "
                "(SamplingParams.banned_tokens)."
            )
        if not example.inputs and not all(map(stands.isdisjoint, (example.prompt, *answers))):
            raise DataError(
                "Tokens of a row stand for images, and it has none: give it images, or take the tokens out."
            )
