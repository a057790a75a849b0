"""Two plots, drawn with Pillow: bars of metrics by stage, and pictures with the models' captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

INK, PAPER = (40, 40, 40), (255, 255, 255)
FILLS = ((148, 163, 184), (37, 99, 235), (22, 163, 74), (217, 119, 6))
HEIGHT, BAR, GAP, MARGIN = 160, 34, 28, 40


def bars(figures: Mapping[str, Mapping[str, float]]) -> Image.Image:
    """A group of bars per metric, from 0 to 1, with one bar per stage."""
    names = list(next(iter(figures.values())))
    group = BAR * len(figures) + GAP
    plot = Image.new("RGB", (2 * MARGIN + group * len(names), HEIGHT + 2 * MARGIN + 24), PAPER)
    pen, floor = ImageDraw.Draw(plot), MARGIN + HEIGHT
    for g, name in enumerate(names):
        for s, values in enumerate(figures.values()):
            left, top = MARGIN + g * group + s * BAR, floor - round(HEIGHT * values[name])
            pen.rectangle((left, top, left + BAR - 4, floor), fill=FILLS[s % len(FILLS)])
            pen.text((left, top - 12), f"{values[name]:.2f}", fill=INK)
        pen.text((MARGIN + g * group, floor + 6), name, fill=INK)
    for s, stage in enumerate(figures):
        pen.rectangle((MARGIN + 90 * s, floor + 32, MARGIN + 90 * s + 10, floor + 42), fill=FILLS[s % len(FILLS)])
        pen.text((MARGIN + 90 * s + 16, floor + 31), stage, fill=INK)
    return plot


def sheet(pictures: Sequence[Sequence[Image.Image]], said: Mapping[str, Sequence[str]]) -> Image.Image:
    """A row per picture: the first of its images, and beside it one line per stage."""
    side, longest = 96, max(len(f"{stage}: {text}") for stage, texts in said.items() for text in texts)
    page = Image.new("RGB", (side + 40 + 7 * longest, (side + 12) * len(pictures) + 12), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (picture, *_) in enumerate(pictures):
        top = 12 + i * (side + 12)
        page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (12, top))
        for s, (stage, texts) in enumerate(said.items()):
            pen.text((side + 28, top + 12 + 24 * s), f"{stage}: {texts[i]}", fill=FILLS[s % len(FILLS)])
    return page
