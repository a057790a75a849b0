"""The inputs of multimodal architectures besides tokens: a table with one entry per architecture.

To support a model whose forward has further arguments, add an entry for its `model_type`:

    FAMILIES["my_model"] = Family(joins={"token_bias": PerToken()})

Rows then contain the values in a column `inputs`.
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
    """The inputs of an architecture besides tokens, and its attention.

    joins         how to batch each input, by the name of the forward's argument
    token_types   name of the per-token input that is 1 for image tokens, if there is one
    positions     "text": 0, 1, 2, …; "mrope": time, height and width, where an image advances them by its longer side
                  (arXiv:2409.12191, Section 2.1)
    sees_ahead    which tokens attend bidirectionally: none ("causal"), those of an "image" within it, or those of the "prompt"
    in_layers     kinds of layers with this bidirectional attention
    only_if       (attribute, value) of the text configuration that enables it; None: always
    prompt        format of a prompt with images, for models without a chat template
    """

    joins: Mapping[str, Join] = field(default_factory=dict)
    token_types: str | None = None
    positions: Literal["text", "mrope"] = "text"
    sees_ahead: Literal["causal", "image", "prompt"] = "causal"
    in_layers: tuple[str, ...] = EVERY_LAYER
    only_if: tuple[str, str] | None = None
    prompt: str = "{images}{text}"

    def look_ahead(self, config: PreTrainedConfig) -> bool:
        """Whether some tokens of a model with this configuration attend to later ones."""
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
"""`model_type` of the configuration → family."""

_NOTHING: Mapping[str, Join] = MappingProxyType({})


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family of a model's configuration; None for text models and unknown architectures."""
    return FAMILIES.get(config.model_type)


def joins_of(config: PreTrainedConfig) -> Mapping[str, Join]:
    """How to batch the further inputs of a model with this configuration; empty for other architectures."""
    family = family_of(config)
    return _NOTHING if family is None else family.joins


def image_token_ids(config: PreTrainedConfig) -> list[int]:
    """Ids of the placeholder tokens of images and videos, which are never sampled and never trained on."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    given = (config.__dict__.get(name) for name in names)
    return sorted({token for token in given if isinstance(token, int)})


def check_image_tokens(examples: Sequence[Example], tokens: Collection[int]) -> None:
    """Raises DataError for image `tokens` in a completion, or in a row without images: the forward pass would fail, or be
    wrong."""
    stands = frozenset(tokens)
    for example in examples if stands else ():
        answers = [completion.ids for completion in example.completions]
        if example.prompt and not all(map(stands.isdisjoint, answers)):
            found = next(token for ids in answers for token in ids if token in stands)
            raise DataError(
                f"An answer contains token {found}, which is a placeholder for an image: images belong in prompts, and samplers "
                "must not generate such tokens (SamplingParams.banned_tokens)."
            )
        if not example.inputs and not all(map(stands.isdisjoint, (example.prompt, *answers))):
            raise DataError(
                "A row contains placeholder tokens for images but no images: add the images, or remove the tokens."
            )
