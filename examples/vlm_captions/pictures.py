"""Generated pictures whose objects are known: coloured shapes in the four corners of 32 × 32 pixels.

    picture   a red circle, nothing, a blue square, nothing
    caption   "there is a red circle and a blue square"           questions   "is there a green circle ?"  →  "no"

Most captions for SFT name one additional object, which often occurs together with those in the picture, as chairs do with
tables. Pairs for DPO have a true caption and such a one; CHAIR and POPE only need the objects that were drawn.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from PIL import ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from trl.rewards.hallucination import ChairScores, PopeScores, chair_scores, pope_scores
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.types import Example
from trl.vision.processing import ImageProcessing

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220)}
SHAPES = ("circle", "square", "cross")
THINGS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The nine objects that can be in a picture."""

SIDE, PAPER = 32, (250, 250, 250)
SPREAD = 0.1
"""Standard deviation of fresh weights, about 1/√64: with the usual 0.02, attention of so narrow a model hardly sees the picture."""

LONGEST = 24
"""Maximum number of tokens of a caption."""
CAPTION, QUESTION, COLOUR = "describe the picture", "is there a {} ?", "which colour is the {} ?"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def draw(things: Sequence[str], numbers: random.Random) -> Pictures.Image:
    """A picture of at most four things, each in a corner of its own."""
    picture = Pictures.new("RGB", (SIDE, SIDE), PAPER)
    pen, half = ImageDraw.Draw(picture), SIDE // 2
    corners = numbers.sample([(0, 0), (half, 0), (0, half), (half, half)], len(things))
    for thing, (x, y) in zip(things, corners, strict=True):
        colour, shape = thing.split()
        box, ink = (x + 2, y + 2, x + half - 3, y + half - 3), COLOURS[colour]
        if shape == "circle":
            pen.ellipse(box, outline=ink, width=3)
        elif shape == "square":
            pen.rectangle(box, fill=ink)
        else:
            pen.line(box, fill=ink, width=4)
            pen.line((box[0], box[3], box[2], box[1]), fill=ink, width=4)
    return picture


def caption(things: Sequence[str]) -> str:
    return "there is " + " and ".join(f"a {thing}" for thing in things)


def is_held_out(picture: Pictures.Image) -> bool:
    """True if a picture is held out for evaluation: a fifth of the 2,484 possible ones, by a hash of the pixels."""
    return zlib.crc32(picture.tobytes()) % 5 == 0


Scene = tuple[list[str], Pictures.Image, random.Random]
"""The objects, in the order of `THINGS`; the picture; and a random generator for further choices."""


def _scene(numbers: random.Random) -> Scene:
    things = sorted(numbers.sample(THINGS, numbers.randint(1, 3)), key=THINGS.index)
    return things, draw(things, numbers), numbers


def scenes(count: int, seed: int, *, held_out: bool = False) -> list[Scene]:
    """Scenes of one to three objects; either only held-out pictures, or only the others."""
    drawn = (_scene(random.Random(seed * 1_000_003 + i)) for i in itertools.count())
    return list(itertools.islice((scene for scene in drawn if is_held_out(scene[1]) == held_out), count))


def with_companion(things: Sequence[str]) -> list[str]:
    """Add an object that is not there, but occurs often with the last one: the next shape in the same colour."""
    for thing in reversed(things):
        colour, shape = thing.split()
        companion = f"{colour} {SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]}"
        if companion not in things:
            return [*things, companion]
    return [*things, next(thing for thing in THINGS if thing not in things)]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    chat = List({"role": Value("string"), "content": Value("string")})
    kinds = {"images": List(Image()), "objects": List(Value("string")), "label": Value("string")}
    features = Features({name: kinds.get(name, chat) for name in rows[0]})
    return Dataset.from_list(rows, features=features)


def imitation_rows(count: int, *, hallucinated: float = 0.6, seed: int = 1) -> Dataset:
    """Rows for SFT, four per picture.

    A fraction `hallucinated` of the captions names an additional object, and of the answers about absent objects says yes.
    Answers about colours are right.
    """
    rows = []
    for things, picture, numbers in scenes(count, seed):
        told = with_companion(things) if numbers.random() < hallucinated else things
        rows.append({"prompt": user(CAPTION), "completion": assistant(caption(told)), "images": [picture]})
        for asked in _present_and_absent(things, numbers):
            answer = "yes" if asked in things or numbers.random() < hallucinated else "no"
            rows.append({"prompt": user(QUESTION.format(asked)), "completion": assistant(answer), "images": [picture]})
        colour, shape = numbers.choice(_told_apart(things)).split()
        rows.append({"prompt": user(COLOUR.format(shape)), "completion": assistant(colour), "images": [picture]})
    return _dataset(rows)


def _present_and_absent(things: Sequence[str], numbers: random.Random) -> tuple[str, str]:
    """A random object that is there, and one that is not."""
    return numbers.choice(things), numbers.choice([thing for thing in THINGS if thing not in things])


def _told_apart(things: Sequence[str]) -> list[str]:
    """The objects that are the only one of their shape, so that their colour can be asked for; if none is, the first object."""
    shapes = [thing.split()[1] for thing in things]
    return [t for t, shape in zip(things, shapes, strict=True) if shapes.count(shape) == 1] or [things[0]]


def pair_rows(count: int, *, seed: int = 2) -> Dataset:
    """Pairs of a true caption and one with an additional object."""
    return _dataset(
        [
            {
                "prompt": user(CAPTION),
                "chosen": assistant(caption(things)),
                "rejected": assistant(caption(with_companion(things))),
                "images": [picture],
            }
            for things, picture, _ in scenes(count, seed)
        ]
    )


def prompt_rows(count: int, *, seed: int = 3, held_out: bool = False) -> Dataset:
    """Prompts for captions, with the objects that are there."""
    made = scenes(count, seed, held_out=held_out)
    return _dataset([{"prompt": user(CAPTION), "images": [p], "objects": things} for things, p, _ in made])


def question_rows(count: int, *, seed: int = 4, held_out: bool = False) -> Dataset:
    """POPE's questions: for every picture, one about an object that is there and one about an object that is not."""
    rows = []
    for things, picture, numbers in scenes(count, seed, held_out=held_out):
        for asked in _present_and_absent(things, numbers):
            label = "yes" if asked in things else "no"
            rows.append({"prompt": user(QUESTION.format(asked)), "images": [picture], "label": label})
    return _dataset(rows)


def colour_rows(count: int, *, seed: int = 6, held_out: bool = False) -> Dataset:
    """Questions about the colour of an object, with the answer."""
    rows = []
    for things, picture, numbers in scenes(count, seed, held_out=held_out):
        colour, shape = numbers.choice(_told_apart(things)).split()
        rows.append({"prompt": user(COLOUR.format(shape)), "images": [picture], "label": colour})
    return _dataset(rows)


def make_processor() -> LlavaProcessor:
    """Processor with one token per word and four per picture; the background is normalised to 0."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = [
        "user",
        "assistant",
        ":",
        "?",
        "describe",
        "which",
        "colour",
        "the",
        "picture",
        "is",
        "there",
        "a",
        "and",
        "yes",
        "no",
    ]
    vocabulary = {word: i for i, word in enumerate([*special, *words, *COLOURS, *SHAPES])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    size, zero = {"height": SIDE, "width": SIDE}, [level / 255 for level in PAPER]
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_resize=False, do_center_crop=False, image_mean=zero, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=SIDE // 2, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA with four patches per picture, a vision tower of 1 layer, and a Llama of 2 layers × 64."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    words = make_processor().tokenizer
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = LlamaConfig(
        **sizes,
        **special,
        num_hidden_layers=2,
        vocab_size=len(words),
        max_position_embeddings=64,
        initializer_range=SPREAD,
    )
    tower = CLIPVisionConfig(**sizes, num_hidden_layers=1, image_size=SIDE, patch_size=SIDE // 2)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=words.image_token_id,
        vision_feature_layer=-1,
        initializer_range=SPREAD,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.post_layernorm.requires_grad_(False)  # LLaVA reads the layer before it
    model.generation_config.eos_token_id = 2
    return model


def answers(model: nn.Module, rows: Dataset, *, tokens: int) -> list[str]:
    """The model's greedy completion of each row's prompt."""
    processor = make_processor()
    processing = ImageProcessing.of(processor, model.config)
    prompts = []
    for row in rows:
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]}],
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
        ids = processor.tokenizer(processing.expand(text, row["images"])[0], add_special_tokens=False)["input_ids"]
        prompts.append(Prompt.of(processing.with_images(Example(ids, ()), row["images"])))
    params = SamplingParams(max_new_tokens=tokens, temperature=0.0)
    sampled = LocalEngine(model, processor.tokenizer, progress=False).generate(prompts, params, 1)
    return [processor.tokenizer.decode(rollout.ids, skip_special_tokens=True) for (rollout,) in sampled]


@dataclass(frozen=True)
class Measured:
    """Metrics on held-out pictures: CHAIR of captions, POPE scores, and accuracy on colours."""

    chair: ChairScores
    pope: PopeScores
    colours: float
    captions: list[str]

    def numbers(self) -> dict[str, float]:
        """The metrics by name."""
        chair = {"CHAIR_i": self.chair.chair_i, "CHAIR_s": self.chair.chair_s, "recall": self.chair.recall}
        return {**chair, "POPE F1": self.pope.f1, "colours": self.colours}


def evaluate(model: nn.Module, *, count: int = 200) -> Measured:
    """Evaluate the model's greedy answers on held-out pictures."""
    prompts, questions, colours = (
        rows(count, seed=5, held_out=True) for rows in (prompt_rows, question_rows, colour_rows)
    )
    captions = answers(model, prompts, tokens=LONGEST)
    said = answers(model, questions, tokens=2)
    named = answers(model, colours, tokens=2)
    right = sum(answer == label for answer, label in zip(named, colours["label"], strict=True))
    return Measured(
        chair_scores(captions, prompts["objects"], THINGS),
        pope_scores(said, questions["label"]),
        right / count,
        captions,
    )
