"""What the tests of images in vLLM share. They need torchvision, as vLLM does for models that read images."""

from __future__ import annotations

import re
from functools import partial
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from tests.serve.images import asked
from tests.vision import support as vision
from tests.vision.test_vision_layouts import plain_logprobs
from tests.vllm.support import PARAMS
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.types import Completion

TOKENS_NEEDED = {"gemma3": ("\n\n", "\n\n\n", "\n\n\n\n")}
"""Line ends that vLLM joins around the images of a family."""

WITH_VIDEO = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
"""Families whose processor vLLM loads with all of its parts: that of videos needs torchvision."""


def with_video(name, stills):
    """The whole processor of a family, with the same images."""
    import transformers

    sizes = {n: getattr(stills.image_processor, n) for n in ("patch_size", "merge_size", "temporal_patch_size", "size")}
    parts = transformers.Qwen2VLImageProcessor(**sizes), stills.tokenizer, transformers.Qwen2VLVideoProcessor(**sizes)
    return getattr(transformers, WITH_VIDEO[name])(*parts, chat_template=stills.chat_template)


def reader(name, seed, folder):
    """A model of this family that reads images, of the same widths, its weights under the names of the hub; and its processor."""
    wide = {"hidden_size": 128, "intermediate_size": 128}
    text = {**wide, "head_dim": 32, "num_key_value_heads": 4, "max_position_embeddings": 512}
    sections = {"mrope_section": [4, 6, 6]}
    words = partial(vision.tokenizer, *TOKENS_NEEDED.get(name, ()))
    with (
        patch.dict(vision.TEXT, text),
        patch.dict(vision.TOWER, wide),
        patch.dict(vision.MROPE, sections),
        patch.object(vision, "tokenizer", words),
    ):
        tiny = vision.FAMILIES[name]()
    if name in WITH_VIDEO:
        tiny.processor = with_video(name, tiny.processor)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    named = {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v for k, v in state.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.model = type(tiny.model).from_pretrained(folder).eval()
    return tiny


def image_prompts(tiny):
    """Examples with one, two and no images, and their prompts for engines."""
    return zip(
        asked(tiny, "*see this", [vision.picture(1)]),
        asked(tiny, "a* b* c", [vision.picture(2, 24, 40), vision.picture(3)]),
        asked(tiny, "no image", []),
        strict=True,
    )


def check_after_images(tiny, engine):
    """Samples are the model's, and the greedy ones those of the engine in process. Returns the largest difference."""
    examples, prompts = image_prompts(tiny)
    differences = []
    for example, group in zip(examples, engine.generate(prompts, PARAMS, 3), strict=True):
        assert len({rollout.ids for rollout in group}) == 3
        for rollout in group:
            with torch.no_grad():
                logprobs = plain_logprobs(tiny, example, Completion(rollout.ids))
            differences.append((logprobs - torch.tensor(rollout.logprobs)).abs().max().item())
    greedy = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True, seed=1)
    expected = LocalEngine(tiny.model, progress=False).generate(prompts, greedy)
    assert [r.ids for (r,) in engine.generate(prompts, greedy)] == [r.ids for (r,) in expected]
    return max(differences)
