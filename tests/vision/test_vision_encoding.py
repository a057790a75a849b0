"""Rows with images: where images are written, where they stand, what is cut, and what is said when something is wrong."""

from __future__ import annotations

import base64
import copy
import io

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.vision.support import FAMILIES, Tiny, gemma3, llava, picture, qwen2_5_vl
from trl.data.encode import EncodeSettings, encode_dataset
from trl.data.examples import ImageCollator
from trl.data.multimodal import split_parts
from trl.errors import ConfigError, DataError
from trl.models.load import load_processor
from trl.types import Completion, Example
from trl.vision.families import check_image_tokens
from trl.vision.images import PixelLimits, image_size, read_image
from trl.vision.processing import ImageProcessing, mrope_positions

ASKED = [{"role": "user", "content": "what is it?"}]
SAID = [{"role": "assistant", "content": "a box"}]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tiny():
    return llava()


def encoded(tiny, columns: dict, **settings):
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    rows = columns if isinstance(columns, Dataset) else Dataset.from_dict(columns)
    made = encode_dataset(rows, tiny.processor.tokenizer, settings=EncodeSettings(**settings), images=processing)
    return made, ImageCollator(processing)


def text_of(tiny, example) -> str:
    ids = [*example.prompt, *(example.completions[0].ids if example.completions else ())]
    return tiny.processor.tokenizer.decode(ids)


def as_bytes(image, format: str = "PNG", **options) -> bytes:
    whole = io.BytesIO()
    image.save(whole, format=format, **options)
    return whole.getvalue()


IMAGE = "<image>" * 4
"""The tiny LLaVA has four tokens for an image."""


def forms(tmp_path) -> dict[str, dict]:
    """One image and one question, in every form."""
    image = picture(1)
    path = tmp_path / "one.png"
    image.save(path)
    parts = [
        {"type": "image", "image": str(path), "text": None},
        {"type": "text", "text": "what is it?", "image": None},
    ]
    return {
        "PIL images": {"prompt": [ASKED], "completion": [SAID], "images": [[image]]},
        "paths": {"prompt": [ASKED], "completion": [SAID], "images": [[str(path)]]},
        "bytes": {"prompt": [ASKED], "completion": [SAID], "images": [[as_bytes(image)]]},
        "one image": {"prompt": [ASKED], "completion": [SAID], "image": [str(path)]},
        "in parts": {"prompt": [[{"role": "user", "content": parts}]], "completion": [SAID]},
        "tagged": {
            "conversations": [
                [{"from": "user", "value": "<image>\nwhat is it?"}, {"from": "assistant", "value": "a box"}]
            ],
            "image": [str(path)],
        },
    }


@pytest.mark.parametrize("form", ["PIL images", "paths", "bytes", "one image", "in parts", "tagged"])
def test_every_form_is_the_same_row(tiny, tmp_path, form):
    columns = forms(tmp_path)[form]
    rows = Dataset.from_dict(columns)
    if form == "PIL images":
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
    made, collate = encoded(tiny, rows)
    (example,) = collate(list(made.dataset))
    assert text_of(tiny, example) == f"user: {IMAGE}what is it?</s>\nassistant: a box</s>\n"
    expected = tiny.processor(images=[picture(1)], text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(example.inputs["pixel_values"], expected)
    assert made.dataset.features["images"] == datasets.List(datasets.Image(decode=False))


def test_pairs_of_a_question_become_a_conversation(tiny):
    """RLAIF-V's columns."""
    columns = {"question": ["what is it?"], "image": [as_bytes(picture(1))], "chosen": ["a box"], "rejected": ["a dog"]}
    made, collate = encoded(tiny, columns, kind="preference")
    (example,) = collate(list(made.dataset))
    decode = tiny.processor.tokenizer.decode
    assert decode(example.prompt) == f"user: {IMAGE}what is it?</s>\nassistant: "
    assert [decode(c.ids) for c in example.completions] == ["a box</s>\n", "a dog</s>\n"]


def test_a_row_without_its_image_is_a_conversation_as_the_others_are(tiny):
    columns = {"prompt": ["a?", "what is it?"], "completion": ["b", "a box"], "image": [None, as_bytes(picture(1))]}
    made, collate = encoded(tiny, columns, kind="prompt_completion")
    assert [text_of(tiny, example) for example in collate(list(made.dataset))] == [
        "user: a?</s>\nassistant: b</s>\n",
        f"user: {IMAGE}what is it?</s>\nassistant: a box</s>\n",
    ]


@pytest.mark.parametrize(
    ("column", "none"), [("image", None), ("images", None), ("images", []), ("images", [None])], ids=str
)
def test_what_a_row_without_images_has_in_their_column(tiny, column, none):
    one = as_bytes(picture(1))
    columns = {"prompt": ["a?", "b?"], "completion": ["c", "d"], column: [one if column == "image" else [one], none]}
    if none == [None]:
        with pytest.raises(DataError, match=r"^Row 2: column 'images' has None in its list of images"):
            encoded(tiny, columns, kind="prompt_completion")
        return
    made, collate = encoded(tiny, columns, kind="prompt_completion")
    first, second = collate(list(made.dataset))
    assert text_of(tiny, second) == "user: b?</s>\nassistant: d</s>\n"
    assert "pixel_values" in first.inputs
    assert "pixel_values" not in second.inputs


def test_whole_conversations_are_trained_on_but_for_image_tokens(tiny):
    columns = {"messages": [[*ASKED, *SAID]] * 2, "images": [[as_bytes(picture(1))], []]}
    made, collate = encoded(tiny, columns, kind="language_modeling")
    image_tokens = set(tiny.processor.image_token_ids)
    for example in collate(list(made.dataset)):
        (completion,) = example.completions
        mask = [True] * len(completion.ids) if completion.mask is None else list(completion.mask)
        assert mask == [token not in image_tokens for token in completion.ids]
    assert any(token in image_tokens for token in made.dataset[0]["completion_ids"][0])


def test_what_the_assistant_said_is_found_behind_images(tiny):
    columns = {"messages": [[*ASKED, *SAID]], "images": [[as_bytes(picture(1))]]}
    made, collate = encoded(tiny, columns, kind="language_modeling", assistant_only_loss=True)
    (example,) = collate(list(made.dataset))
    (completion,) = example.completions
    trained = [token for token, keep in zip(completion.ids, completion.mask, strict=True) if keep]
    assert tiny.processor.tokenizer.decode(trained) == "a box</s>"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_text_prompts_begin_with_their_images():
    tiny = FAMILIES["paligemma"]()
    columns = {"prompt": ["caption"], "completion": [" a box"], "images": [[as_bytes(picture(1))]]}
    made, collate = encoded(tiny, columns, kind="prompt_completion")
    (example,) = collate(list(made.dataset))
    ids = tiny.processor(images=[picture(1)], text="caption", return_tensors="pt")["input_ids"][0].tolist()
    found = [token for token in example.prompt if token != 1]
    assert found == [token for token in ids if token != 1]
    assert example.inputs["token_type_ids"].tolist() == [0] * len(example.prompt)


# ---- counting without pixels ----


@pytest.mark.parametrize("name", FAMILIES)
def test_expansions_are_those_of_the_processor(name):
    """By the size in the file's head alone, for several sizes, alone and with others."""
    tiny = FAMILIES[name]()
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    for width, height in ((40, 24), (24, 60), (16, 16), (90, 20)):
        image = picture(1, width, height)
        real = processing.processed([image])[1][0]
        assert processing.expansion((height, width)) == real


def test_nothing_is_decoded_to_count(monkeypatch):
    tiny = qwen2_5_vl()
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    processing.expansion((24, 40))  # what stands around tokens is learned once
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("an image was decoded"))
    text, _ = processing.expand(processing.place, [as_bytes_of_size(48, 32)])
    assert text.count(processing.token) == 12


def as_bytes_of_size(width: int, height: int) -> bytes:
    return as_bytes(picture(3, width, height))


def test_limits_on_pixels():
    large = picture(1, 100, 40)
    limits = PixelLimits(max_pixels=1000, min_pixels=100)
    height, width = image_size(large, limits)
    assert height * width <= 1000
    assert width / height == pytest.approx(2.5, rel=0.1)
    assert read_image(large, limits).size == (width, height)
    assert image_size(picture(1, 4, 4), limits) == (10, 10)
    with pytest.raises(ConfigError, match="min_pixels=20 is more than max_pixels=10"):
        PixelLimits(max_pixels=10, min_pixels=20)


def test_images_that_lie_on_their_side(tmp_path):
    exif = picture(1).getexif()
    exif[0x0112] = 6
    picture(1, 40, 24).save(tmp_path / "side.jpg", exif=exif)
    assert image_size(str(tmp_path / "side.jpg"), PixelLimits()) == (40, 24)
    assert read_image(str(tmp_path / "side.jpg"), PixelLimits()).size == (24, 40)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_positions_are_those_of_the_model(count):
    tiny = qwen2_5_vl()
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    images = [picture(1), picture(2, 24, 60)][:count]
    text = "a" + f"{processing.place}d" * count + "bc"
    inputs = tiny.processor(images=images or None, text=text, return_tensors="pt")
    given = {k: inputs[k] for k in ("mm_token_type_ids", "image_grid_thw") if k in inputs}
    expected, deltas = tiny.model.model.get_rope_index(inputs["input_ids"], **given)
    grids = inputs["image_grid_thw"].numpy() if count else np.zeros((0, 3), int)
    found, after = mrope_positions((inputs["input_ids"][0] == processing.token_id).numpy(), grids, 2)
    assert np.array_equal(found, expected[:, 0].numpy())
    assert after == inputs["input_ids"].shape[1] + deltas[0, 0].item()


# ---- cutting ----


def test_cutting_never_cuts_an_image(tiny, caplog):
    """The completion is cut; a row whose prompt alone is too long is dropped, counted and named."""
    long = [{"role": "assistant", "content": "a box " * 10}]
    wordy = [{"role": "user", "content": "what " * 20}]
    one = [[as_bytes(picture(1))]]
    columns = {"prompt": [ASKED, wordy, ASKED], "completion": [long, long, SAID], "images": one * 3}
    for mode in ("keep_start", "keep_end"):
        made, collate = encoded(tiny, columns, max_length=60, truncation_mode=mode)
        assert (made.report.rows, made.report.truncated, made.report.overlong) == (2, 1, 1)
        cut, whole = collate(list(made.dataset))
        assert cut.length == 60
        assert text_of(tiny, cut).count("<image>") == text_of(tiny, whole).count("<image>") == 4
        assert "1 dropped (images do not fit into max_length)" in caplog.text
        assert "first such rows: [2]" in caplog.text


def test_no_row_fits_with_its_image(tiny):
    columns = {"prompt": [ASKED], "completion": [SAID], "image": [as_bytes(picture(1))]}
    with pytest.raises(
        DataError, match="images, and the tokens before them, are never cut.*max_prompt_length=3.*max_pixels"
    ):
        encoded(tiny, columns, max_prompt_length=3)


def test_an_image_late_in_a_chat_is_not_cut(tiny):
    asked = [{"type": "text", "text": "look " * 8}, {"type": "image", "text": None}]
    said = [{"type": "text", "text": "a box"}]
    later = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    columns = {"messages": [later], "images": [[as_bytes(picture(1))]]}
    made, _ = encoded(tiny, columns, max_length=60)
    assert made.dataset[0]["completion_ids"][0].count(tiny.processor.image_token_id) == 4
    with pytest.raises(DataError, match="No row of 'train' fits: images, and the tokens before them, are never cut"):
        encoded(tiny, columns, max_length=47)


# ---- errors ----


def test_a_tokenizer_reads_no_images(tiny):
    rows = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "images": [[b"x"]]})
    with pytest.raises(
        DataError, match=r"\['images'\] hold images, which a tokenizer cannot process.*processing_class"
    ):
        encode_dataset(rows, tiny.processor.tokenizer)


def test_places_and_images_are_as_many(tiny):
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    with pytest.raises(DataError, match="Row 1: the messages have placeholders for 2 images, but the row has 1"):
        encoded(tiny, {"prompt": [two], "completion": [SAID], "images": [[as_bytes(picture(1))]]})


def parts_of(*parts) -> list[dict]:
    """One message; parts of a column have the same keys."""
    return [{"role": "assistant", "content": [{"text": None, "image": None, **part} for part in parts]}]


HELD = {"type": "image", "image": "one.png"}
NO = {"type": "text", "text": "a dog"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (parts_of(NO), parts_of({"type": "image"}, NO), "'rejected' has an image"),
        (parts_of(NO), parts_of(HELD, NO), "'rejected' has an image"),
        (SAID, [{"role": "assistant", "content": "<image>a dog"}], "'rejected' has an image"),
        ([{"role": "assistant", "content": "<image>a box"}], SAID, "'chosen' has an image"),
    ],
)
def test_answers_have_no_images_of_their_own(tiny, chosen, rejected, message):
    columns = {"prompt": [ASKED], "chosen": [chosen], "rejected": [rejected]}
    for images in ({}, {"images": [[as_bytes(picture(1))]]}):
        with pytest.raises(DataError, match=f"Row 1: {message}.*share the images of the prompt"):
            encoded(tiny, {**columns, **images})


@pytest.mark.parametrize("build", [llava, gemma3, qwen2_5_vl])
def test_a_prompt_that_a_script_has_rendered_is_the_conversation(build, tmp_path):
    made = build()
    path = str(tmp_path / "one.png")
    picture(1).save(path)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = made.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    columns = [{"prompt": [prompt], "image": [path]} for prompt in (text, asked)]
    rendered, whole = (encoded(made, each, kind="prompt_only")[0].dataset[0]["prompt_ids"] for each in columns)
    assert rendered == whole


def test_both_sides_of_a_pair_show_the_images_of_its_prompt(tiny, tmp_path):
    """In pairs without a prompt both sides hold them; a text that stands for one is no answer either."""
    paths = [str(tmp_path / f"{seed}.png") for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        picture(seed).save(path)
    asked = [{"role": "user", "content": [{"type": "image", "image": path}]} for path in paths]
    said = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in ("a box", "a dog")]
    chosen, rejected, other = [asked[0], said[0]], [asked[0], said[1]], [asked[1], said[1]]
    made, collate = encoded(tiny, {"chosen": [chosen], "rejected": [rejected]}, kind="preference")
    (example,) = collate(list(made.dataset))
    assert tiny.processor.tokenizer.decode(example.prompt).count("<image>") == 4
    with pytest.raises(DataError, match="Row 1: 'rejected' has other images than 'chosen'"):
        encoded(tiny, {"chosen": [chosen], "rejected": [other]}, kind="preference")
    with pytest.raises(DataError, match="Row 1: 'completion' has '<image>', the placeholder of an image"):
        encoded(tiny, {"prompt": ["a"], "completion": ["<image>"]})


def test_columns_of_images_that_nobody_reads(tiny):
    image = as_bytes(picture(1))
    rows = Dataset.from_dict({"prompt": [ASKED], "completion": [SAID], "image": [image], "rejected_image": [image]})
    rows = rows.cast_column("rejected_image", datasets.Image())
    with pytest.raises(DataError, match=r"\['rejected_image'\] hold images, but are not used"):
        encoded(tiny, rows)
    made, _ = encoded(tiny, rows, keep_columns=("rejected_image",))
    assert made.dataset[0]["rejected_image"].size == picture(1).size


@pytest.mark.parametrize("value", ["a/b.PNG", ["one.jpg"], b"...", "data:image/png;base64,AA=="])
def test_names_of_images_in_a_column_that_nobody_reads(tiny, caplog, value):
    """A model that is shown none learns to answer without; where rewards are given the column, it is said."""
    columns = {"prompt": [ASKED], "completion": [SAID], "picture": [value]}
    with pytest.raises(DataError, match=r"\['picture'\] hold images, but are not used"):
        encoded(tiny, columns)
    encoded(tiny, columns, keep_columns=("picture",))
    assert "['picture'] hold images, but the model is not given them" in caplog.text
    shown = {**columns, "image": [as_bytes(picture(1))]}
    assert len(encoded(tiny, shown)[0].dataset) == 1  # beside the image, where it comes from


def test_sound_and_video_are_not_learned_from(tiny):
    with pytest.raises(DataError, match=r"video are not supported.*\['videos'\]"):
        encoded(tiny, {"prompt": [ASKED], "completion": [SAID], "videos": [["a.mp4"]]})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": "a.mp4"}, "part 1 is neither text nor an image.*'video'"),
        ({"type": "text", "caption": "a"}, "part 1 of type text has no text.*'caption'"),
    ],
)
def test_parts_that_are_neither_text_nor_images(tiny, part, message):
    with pytest.raises(DataError, match=f"Row 1: message 1: {message}"):
        encoded(tiny, {"prompt": [[{"role": "user", "content": [part]}]], "completion": [SAID]})


def test_texts_of_parts_under_other_names(tiny):
    asked = [{"role": "user", "content": [{"type": "text", "value": "what is it?"}]}]
    made, collate = encoded(tiny, {"prompt": [asked], "completion": [SAID]})
    assert "what is it?" in text_of(tiny, collate(list(made.dataset))[0])


def test_a_template_that_shows_the_first_part_alone(tiny):
    template = (
        "{% for m in messages %}{% for p in m['content'][:1] %}{{ p.text }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    parts = [{"type": "text", "text": text} for text in ("what", "is it?")]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    other = copy.copy(tiny.processor)
    other.chat_template = template
    with pytest.raises(DataError, match="message 1.*does not show its content, 'is it\\?'"):
        encoded(Tiny(tiny.model, other), {"messages": [messages]})


def test_tokens_of_images_are_counted_before_a_forward():
    """A model that is given them without pixels computes something, and something else than it is asked."""
    tokens, answer = [70, 71], Completion([5, 6])
    pixels = {"pixel_values": torch.zeros(1)}
    check_image_tokens(
        [Example([5, 70, 6], (answer, answer), pixels), Example([], (Completion([5, 70]),), pixels)], tokens
    )
    check_image_tokens([Example([5, 70], (answer,))], [])
    for example in (Example([5], (answer, Completion([6, 71]))), Example([5, 70], (answer, Completion([71])), pixels)):
        with pytest.raises(DataError, match="An answer contains token 71, which is a placeholder for an image"):
            check_image_tokens([example], tokens)
    for example in (Example([5, 70], (answer,)), Example([], (Completion([5, 70]),))):
        with pytest.raises(DataError, match="A row contains placeholder tokens for images but no images"):
            check_image_tokens([example], tokens)


def test_an_image_that_breaks_off_is_named_with_its_row(tiny, tmp_path):
    """Its head is whole, so that it is found out when it is decoded."""
    (tmp_path / "broken.png").write_bytes(as_bytes(picture(1, 300, 200))[:-300])
    columns = {"prompt": [ASKED], "completion": [SAID], "images": [[str(tmp_path / "broken.png")]]}
    made, collate = encoded(tiny, columns)
    with pytest.raises(
        DataError, match=r"broken.png' cannot be decoded: .* the row that begins with 'user: what is it"
    ):
        collate(list(made.dataset))


def test_tokens_of_images_without_images(tiny):
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    example = Example([processing.token_id, 5], (Completion([6]),))
    with pytest.raises(DataError, match="There are 1 image tokens .*, but no image"):
        processing.with_images(example, [])
    with pytest.raises(DataError, match="1 image tokens, but its 1 images have 4 features"):
        processing.with_images(example, [picture(1)])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/nowhere/a.png", "There is no file '/nowhere/a.png'"),
        (b"no image", "does not contain an image in a format that Pillow can read"),
        ("https://example.org/a.png", "is a URL: download images beforehand"),
        ("", "is an empty string"),
        (as_bytes(Image.new("F", (2, 2)), "TIFF"), "floating-point pixels"),
    ],
)
def test_images_that_are_none(tiny, image, message):
    with pytest.raises(DataError, match=f"Row 1: .*{message}"):
        encoded(tiny, {"prompt": [ASKED], "completion": [SAID], "images": [[image]]})


def test_an_unknown_family_is_told_what_is_missing():
    tiny = gemma3()
    tiny.model.config.__class__.model_type, before = "unheard_of", tiny.model.config.__class__.model_type
    try:
        with pytest.raises(
            ConfigError,
            match="not supported for models of type 'unheard_of': add an entry to trl.vision.families.FAMILIES",
        ):
            ImageProcessing.of(tiny.processor, tiny.model.config)
    finally:
        tiny.model.config.__class__.model_type = before


def test_trials_have_no_image_token_among_words_and_a_size_that_the_model_reads(monkeypatch):
    """Of a tokenizer whose image token is one of the first, and a processor that resizes nothing."""
    tiny = llava()
    tiny.processor.image_processor.do_resize = tiny.processor.image_processor.do_center_crop = False
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    monkeypatch.setattr(type(tiny.processor), "image_token_ids", [processing.token_id, 5])
    example, text = processing.trial()
    assert example.inputs["pixel_values"].shape[-2:] == (16, 16)
    completions = [*example.completions, *text.completions]
    assert not {5, processing.token_id} & {token for completion in completions for token in completion.ids}


def test_images_are_read_as_a_person_sees_them():
    """16 bits of grey are not cut off at 255, and what is transparent is white and not the colour behind it."""
    grey = Image.fromarray(np.array([[0, 16448], [32896, 65535]], np.uint16))
    assert [read_image(as_bytes(grey), PixelLimits()).getpixel((x, y))[0] for y in (0, 1) for x in (0, 1)] == [
        0,
        64,
        128,
        255,
    ]
    assert read_image(as_bytes(Image.new("RGBA", (2, 2), (255, 0, 0, 0))), PixelLimits()).getpixel((0, 0)) == (255,) * 3
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = read_image(as_bytes(ink, "JPEG"), PixelLimits()).getpixel((4, 4))
    assert (red > 250, green < 5, blue < 5) == (True, True, True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (as_bytes(Image.new("RGB", (4, 4)))[:20], "20 bytes cannot be opened as an image"),
        (as_bytes(Image.new("1", (20_000, 20_000))), "exceeds limit of .* PIL.Image.MAX_IMAGE_PIXELS"),
        (Image.new("F", (2, 2)), "floating-point pixels"),
        ("data:image/png;base64,%%%", "base64 cannot be read .* it begins with '%%%'"),
    ],
)
def test_what_is_no_image(value, message):
    with pytest.raises(DataError, match=message):
        read_image(value, PixelLimits())


def test_images_in_base64():
    whole = as_bytes(picture(1))
    text = base64.b64encode(whole).decode()
    assert read_image(f"data:image/png;base64,{text}", PixelLimits()).size == picture(1).size
    for part in (
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": "cat.png", "detail": "low"}},
    ):
        (_,), (held,) = split_parts([{"role": "user", "content": [part]}])
        assert held == (whole if "base64" in part else "cat.png")


def test_a_size_that_the_processor_refuses_is_named():
    tiny = qwen2_5_vl()
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    with pytest.raises(DataError, match="cannot process an image of 3,000 × 3 pixels: .*aspect ratio"):
        processing.expand(processing.place, [Image.new("RGB", (3000, 3))])


def test_a_processor_of_an_older_transformers_is_named(monkeypatch):
    tiny = llava()
    monkeypatch.delattr(type(tiny.processor), "replace_image_token")
    with pytest.raises(ConfigError, match="LlavaProcessor of transformers .* install 5.15 or later"):
        ImageProcessing.of(tiny.processor, tiny.model.config)


def test_a_folder_with_a_processor_gives_it(tiny, tmp_path):
    """An adapter's folder, say, which holds no model to find it by."""
    tiny.processor.save_pretrained(tmp_path)
    assert type(load_processor(tiny.model, str(tmp_path))) is type(tiny.processor)
