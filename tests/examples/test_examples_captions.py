"""The captioning example: its pictures hold what they say, its rows the hallucinations that they should, and its model learns."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "vlm_captions"))

import pictures
import plots
from pictures import COLOURS, PAPER, SIDE, THINGS

from trl.rewards.hallucination import chair_scores


def colours_in(picture) -> set[str]:
    """Names of the colours of a picture's pixels."""
    by_ink = {ink: name for name, ink in COLOURS.items()}
    return {by_ink[ink] for _, ink in picture.getcolors() if ink != PAPER}


@pytest.mark.parametrize("thing", THINGS)
def test_a_thing_is_drawn_in_its_colour_inside_of_one_corner(thing):
    picture = pictures.draw([thing], random.Random(0))
    assert picture.size == (SIDE, SIDE)
    assert colours_in(picture) == {thing.split()[0]}
    half = SIDE // 2
    corners = [picture.crop((x, y, x + half, y + half)) for x in (0, half) for y in (0, half)]
    assert sum(bool(colours_in(corner)) for corner in corners) == 1


def test_no_two_things_look_alike():
    drawn = {pictures.draw([thing], random.Random(0)).tobytes() for thing in THINGS}
    assert len(drawn) == len(THINGS)


def test_scenes_are_the_same_for_a_seed_and_others_for_another():
    first, again, other = (pictures.scenes(20, seed) for seed in (1, 1, 5))
    assert [things for things, *_ in first] == [things for things, *_ in again]
    assert [p.tobytes() for _, p, _ in first] == [p.tobytes() for _, p, _ in again]
    assert [p.tobytes() for _, p, _ in first] != [p.tobytes() for _, p, _ in other]
    for things, picture, _ in first:
        assert 1 <= len(things) <= 3
        assert colours_in(picture) == {thing.split()[0] for thing in things}


def test_no_picture_of_evaluation_is_trained_on():
    trained = {p.tobytes() for seed in (1, 2, 3, 4) for _, p, _ in pictures.scenes(200, seed)}
    held_out = [p.tobytes() for _, p, _ in pictures.scenes(100, 5, held_out=True)]
    assert not trained & set(held_out)
    assert len(set(held_out)) > 50


@pytest.mark.parametrize(
    ("things", "named"),
    [
        (["red circle"], "red square"),
        (["red circle", "blue cross"], "blue circle"),
        (["red circle", "red square", "red cross"], "green circle"),
    ],
)
def test_the_companion_of_what_is_there_is_not_there(things, named):
    assert pictures.with_companion(things) == [*things, named]


def text(rows, column):
    return [row[0]["content"] for row in rows[column]]


def test_the_given_share_of_what_is_imitated_is_hallucinated():
    """Half of the questions are about what is there, to which the answer is yes; 0.6 of the others are answered so too."""
    rows = pictures.imitation_rows(200)
    asked, told = text(rows, "prompt"), text(rows, "completion")
    captions = [answer for question, answer in zip(asked, told, strict=True) if question == pictures.CAPTION]
    objects = [things for things, *_ in pictures.scenes(200, 1)]
    scores = chair_scores(captions, objects, THINGS)
    assert (len(captions), scores.recall) == (200, 1.0)
    assert scores.chair_s == pytest.approx(0.6, abs=0.1)
    answers = [answer for question, answer in zip(asked, told, strict=True) if question.startswith("is there")]
    assert len(answers) == 400
    assert answers.count("yes") / 400 == pytest.approx(0.5 + 0.5 * 0.6, abs=0.07)


def test_pairs_differ_by_the_companion_alone():
    rows = pictures.pair_rows(20)
    for chosen, rejected, (things, *_) in zip(
        text(rows, "chosen"), text(rows, "rejected"), pictures.scenes(20, 2), strict=True
    ):
        assert chair_scores([chosen], [things], THINGS).as_dict() | {"words": 0} == {
            "chair_i": 0, "chair_s": 0, "recall": 1, "words": 0,
        }  # fmt: skip
        assert rejected.startswith(chosen + " and a ")
        assert chair_scores([rejected], [things], THINGS).chair_i == pytest.approx(1 / (len(things) + 1))


def test_a_picture_takes_as_many_tokens_as_it_has_features():
    model, processor = pictures.make_model(), pictures.make_processor()
    _, picture, _ = pictures.scenes(1, 5)[0]
    made = processor(images=picture, text="user : <image> describe the picture", return_tensors="pt")
    assert (made["input_ids"] == processor.tokenizer.image_token_id).sum() == 4
    assert made["pixel_values"].flatten(2).abs().amin() == 0  # paper
    with torch.no_grad():
        (features,) = model.model.get_image_features(made["pixel_values"], return_dict=True).pooler_output
    assert features.shape == (4, 64)


def test_plots_have_a_bar_per_figure_and_a_line_per_picture():
    figures = {"SFT": {"recall": 0.5, "POPE F1": 1.0}, "DPO": {"recall": 0.0, "POPE F1": 0.25}}
    plot = plots.bars(figures)
    heights = [plot.crop((x, 0, x + 1, plot.height)).tobytes() for x in range(plot.width)]
    assert len(set(heights)) > 4
    rows = pictures.prompt_rows(3, seed=5)
    page = plots.sheet(rows["images"], {"SFT": ["there is a red circle"] * 3})
    assert page.height == 3 * 108 + 12


@pytest.mark.slow
@pytest.mark.long
def test_it_learns_to_see_and_then_not_to_hallucinate(tmp_path):
    script = runpy.run_path(str(Path(pictures.__file__).with_name("run.py")))
    measured = script["run"](seed=0)
    script["write"](measured, tmp_path)
    sft, dpo, grpo = (measured[name].numbers() for name in ("SFT", "DPO", "GRPO"))
    assert sft["colours"] >= 0.95
    assert dpo["CHAIR_i"] <= 0.5 * sft["CHAIR_i"]
    assert abs(dpo["recall"] - sft["recall"]) <= 0.03
    assert grpo["POPE F1"] >= sft["POPE F1"] + 0.1
    assert grpo["CHAIR_i"] <= 0.5 * sft["CHAIR_i"]
    assert set(json.loads((tmp_path / "measured.json").read_text())) == {"SFT", "DPO", "GRPO"}
