"""Tiny vision-language models of every family, with processors that are made on the spot and need no torchvision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
ALPHABET = sorted("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?'\n-")
TEMPLATE = (
    "{{% for m in messages %}}{{{{ m['role'] }}}}: {{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
    "{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}{{{{ eos_token }}}}\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}assistant: {{% endif %}}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
"""The sections' sum is half of `head_dim`."""

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(*tokens: str, image: str, **named: str) -> Any:
    """Letters, with special tokens of their own; `named` ones are attributes."""
    added = list(dict.fromkeys([image, *named.values(), *tokens]))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET, *added])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=added, extra_special_tokens={"image_token": image, **named},
    )  # fmt: skip


def without_video(cls: type, **own: Any) -> type:
    """A processor class that takes no video processor, which would need torchvision."""

    class Stills(cls):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
            for name, value in own.items():
                setattr(self, name, value(tokenizer) if callable(value) else value)

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    return Stills


class PixtralStills(ProcessorMixin):
    """What the processor of Pixtral and Mistral 3 does, whose module needs torchvision: rows of tokens with breaks."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.cell = 8

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)

    def _process_images(self, images, **options):
        return super()._process_images(images, **{**options, "patch_size": {"height": self.cell, "width": self.cell}})

    def replace_image_token(self, image_inputs, image_idx, **_):
        height, width = image_inputs["image_sizes"][image_idx]
        rows = ["[IMG]" * (int(width) // self.cell)] * (int(height) // self.cell)
        return "[IMG_BREAK]".join(rows) + "[IMG_END]"

    def _get_num_multimodal_tokens(self, image_sizes=None, **_):
        inputs = [self._process_images([Image.new("RGB", size[::-1])])[1][0] for size in image_sizes]
        return {"num_image_tokens": [text.count("[IMG") for text in inputs]}


@dataclass
class Tiny:
    """A model, its processor, and the layouts that it runs in."""

    model: Any
    processor: Any
    layouts: tuple[str, ...] = ("padded", "packed", "shared")

    def __post_init__(self):
        if type(self.processor).replace_image_token is ProcessorMixin.replace_image_token:
            pytest.skip(f"Transformers {hf.__version__} does not say which tokens stand for an image: refused.")


def seeded(build: Callable[[], Any], scale: float = 3.0) -> Any:
    """A random model, its weights large enough that everything in a prompt matters."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale) if parameter.any() else parameter.normal_(std=0.3)
    return model


def template(image: str) -> str:
    return TEMPLATE.format(image=image)


def llava() -> Tiny:
    words = tokenizer(image="<image>")
    processor = hf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), words, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=16, patch_size=8), vision_feature_layer=-1,
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words)), image_token_index=words.image_token_id,
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.LlavaForConditionalGeneration(config)), processor)


def llava_next() -> Tiny:
    words = tokenizer(image="<image>")
    grid = [[16, 32], [32, 16], [32, 32]]
    processor = hf.LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grid
        ),
        words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=16, patch_size=8), vision_feature_layer=-1,
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words)), image_token_index=words.image_token_id,
        image_grid_pinpoints=grid,
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.LlavaNextForConditionalGeneration(config)), processor)


def llava_onevision() -> Tiny:
    words = tokenizer(image="<image>", video_token="<video>")
    grid = [[16, 16], [16, 32], [32, 16], [32, 32]]
    own = {
        "num_image_tokens": 4, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        "video_token": "<video>", "video_token_id": lambda t: t.video_token_id,
    }  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=grid)
    processor = without_video(LlavaOnevisionProcessor, **own)(images, words, chat_template=template("<image>"))
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=16, patch_size=8, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(words)), image_token_index=words.image_token_id,
        video_token_index=words.video_token_id, image_grid_pinpoints=grid, vision_feature_layer=-1,
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.LlavaOnevisionForConditionalGeneration(config)), processor)


def qwen2_5_vl() -> Tiny:
    words = tokenizer("<|vision_start|>", "<|vision_end|>", image="<|image_pad|>", video_token="<|video_pad|>")
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    own = {"video_token": "<|video_pad|>", "video_token_id": lambda t: t.video_token_id}
    chat = template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = without_video(Qwen2_5_VLProcessor, **own)(images, words, chat_template=chat)
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    config = hf.Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": len(words), "rope_parameters": dict(MROPE)},
        vision_config={
            **_qwen_tower(), "out_hidden_size": TEXT["hidden_size"], "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        },
        **_qwen_tokens(words),
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.Qwen2_5_VLForConditionalGeneration(config)), processor)


def _qwen_tower() -> dict[str, int]:
    sizes = {name: TOWER[name] for name in ("hidden_size", "intermediate_size")}
    return {**sizes, "depth": TOWER["num_hidden_layers"], "num_heads": TOWER["num_attention_heads"]}


def _qwen_tokens(words: Any) -> dict[str, int]:
    names = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: words.convert_tokens_to_ids(token) for name, token in names.items()}
    return {**ids, "image_token_id": words.image_token_id, "video_token_id": words.video_token_id}


def qwen2_vl() -> Tiny:
    tiny = qwen2_5_vl()
    words = tiny.processor.tokenizer
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    config = hf.Qwen2VLConfig(
        text_config={**text, "vocab_size": len(words), "rope_parameters": dict(MROPE)},
        vision_config={
            "depth": 2, "embed_dim": TOWER["hidden_size"], "hidden_size": TEXT["hidden_size"], "num_heads": 4, "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        **_qwen_tokens(words),
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.Qwen2VLForConditionalGeneration(config)), tiny.processor)


def qwen3_vl() -> Tiny:
    tiny = qwen2_5_vl()
    words = tiny.processor.tokenizer
    own = {"video_token": "<|video_pad|>", "video_token_id": lambda t: t.video_token_id}
    chat = tiny.processor.chat_template
    processor = without_video(Qwen3VLProcessor, **own)(tiny.processor.image_processor, words, chat_template=chat)
    config = hf.Qwen3VLConfig(
        text_config={**TEXT, "vocab_size": len(words), "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={
            **_qwen_tower(), "out_hidden_size": TEXT["hidden_size"], "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
        **_qwen_tokens(words),
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.Qwen3VLForConditionalGeneration(config)), processor)


def qwen3_5() -> Tiny:
    """With recurrent layers, of which rows have to be apart."""
    tiny = qwen3_vl()
    words = tiny.processor.tokenizer
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = hf.Qwen3_5Config(
        text_config={
            **TEXT, **linear, "vocab_size": len(words), "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        },
        vision_config={
            **_qwen_tower(), "out_hidden_size": TEXT["hidden_size"], "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [],
        },
        **_qwen_tokens(words),
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.Qwen3_5ForConditionalGeneration(config)), tiny.processor, ("padded",))


def gemma3() -> Tiny:
    words = tokenizer(image="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = hf.Gemma3Processor(images, words, image_seq_length=4, chat_template=template("<start_of_image>"))
    layers = ["sliding_attention", "full_attention"]
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, vocab_size=len(words), sliding_window=9, layer_types=layers),
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4, image_token_id=words.image_token_id, boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.Gemma3ForConditionalGeneration(config)), processor)


def gemma4() -> Tiny:
    words = tokenizer(image="<|image|>", boi_token="<|image>", eoi_token="<image|>")
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    own = {
        "image_seq_length": 70, "boi_token": lambda t: t.boi_token, "eoi_token": lambda t: t.eoi_token,
        "audio_token": None, "audio_token_id": None, "video_token": None, "video_token_id": None,
    }  # fmt: skip
    # In older releases of transformers its module needs torchvision.
    module = pytest.importorskip("transformers.models.gemma4.processing_gemma4", exc_type=ImportError)
    processor = without_video(module.Gemma4Processor, **own)(images, words, chat_template=template("<|image|>"))
    layers = ["sliding_attention", "full_attention"]
    config = hf.Gemma4Config(
        text_config={
            **TEXT, "vocab_size": len(words), "sliding_window": 9, "layer_types": layers, "global_head_dim": 8,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(words), "num_kv_shared_layers": 0,
            "use_bidirectional_attention": "vision",
        },
        vision_config={**TOWER, "num_key_value_heads": 4, "head_dim": 8, "global_head_dim": 8, "patch_size": 4,
                       "pooling_kernel_size": 2, "position_embedding_size": 64, "default_output_length": 70},
        audio_config=None, image_token_id=words.image_token_id, boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id,
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.Gemma4ForConditionalGeneration(config)), processor)


def idefics3(name: str = "Idefics3") -> Tiny:
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    words = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows, image="<image>")
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = hf.Idefics3Processor(images, words, image_seq_len=4, chat_template=template("<image>"))
    config = getattr(hf, f"{name}Config")(
        vision_config={**TOWER, "image_size": 16, "patch_size": 4}, scale_factor=2,
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words)), image_token_id=words.image_token_id, pad_token_id=0,
    )  # fmt: skip
    return Tiny(seeded(lambda: getattr(hf, f"{name}ForConditionalGeneration")(config)), processor)


def smolvlm() -> Tiny:
    return idefics3("SmolVLM")


def internvl() -> Tiny:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    words = tokenizer(image="<IMG_CONTEXT>", context_image_token="<IMG_CONTEXT>", **named)
    images = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, min_patches=1, max_patches=4, crop_to_patches=True
    )
    own = {
        "image_seq_length": 4, "start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>",
        "start_image_token_id": lambda t: t.start_image_token_id, "end_image_token_id": lambda t: t.end_image_token_id,
    }  # fmt: skip
    processor = without_video(InternVLProcessor, **own)(images, words, chat_template=template("<IMG_CONTEXT>"))
    config = hf.InternVLConfig(
        vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(words)), image_token_id=words.image_token_id,
        downsample_ratio=0.5, image_seq_length=4,
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.InternVLForConditionalGeneration(config)), processor)


def mistral3() -> Tiny:
    words = tokenizer("[IMG_BREAK]", "[IMG_END]", image="[IMG]")
    images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4})
    processor = PixtralStills(images, words, chat_template=template("[IMG]"))
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**TOWER, image_size=32, patch_size=4, head_dim=8),
        text_config=hf.MistralConfig(**TEXT, vocab_size=len(words), sliding_window=None),
        image_token_index=words.image_token_id, spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.Mistral3ForConditionalGeneration(config)), processor)


def paligemma() -> Tiny:
    words = tokenizer(image="<image>")
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, words)
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=16, patch_size=4, vision_use_head=False),
        text_config=hf.GemmaConfig(**TEXT, vocab_size=len(words)), image_token_index=words.image_token_id,
        projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return Tiny(seeded(lambda: hf.PaliGemmaForConditionalGeneration(config)), processor)


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "mistral3": mistral3,
    "paligemma": paligemma,
}


def picture(seed: int, width: int = 40, height: int = 24) -> Image.Image:
    """A few coloured boxes."""
    generator = torch.Generator().manual_seed(seed)
    image = Image.new("RGB", (width, height), (240, 240, 240))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, w, h, *colour = torch.randint(0, 255, (7,), generator=generator).tolist()
        box = (x % width, y % height, x % width + w % 16 + 2, y % height + h % 16 + 2)
        draw.rectangle(box, fill=tuple(colour))
    return image
