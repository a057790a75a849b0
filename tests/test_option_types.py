"""What type hints admit: read from annotations and live types alike; values that are none of the choices."""

import ast
import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, ForwardRef, Literal, Optional, Union

import pytest
from transformers import HfArgumentParser

from trl.errors import ConfigError
from trl.option_types import OptionType, check_choices, kind_of_annotation, kind_of_type


class Pace(enum.Enum):
    SLOW = "slow"
    FAST = "fast"


PACE = OptionType(choices=("slow", "fast"))


def annotated(text: str) -> OptionType:
    return kind_of_annotation(ast.parse(text, mode="eval").body, {"Pace": PACE}.get)


@pytest.mark.parametrize(
    ("text", "live", "kind"),
    [
        ("int", int, OptionType(("int",))),
        ("int | None", int | None, OptionType(("int", "none"))),
        ("Optional[float]", Optional[float], OptionType(("float", "none"))),  # noqa: UP045
        ("Union[int, str]", Union[int, str], OptionType(("int", "str"))),  # noqa: UP007
        ("'int | str'", int | str, OptionType(("int", "str"))),
        ("list[str] | None", list[str] | None, OptionType(("none",), item=OptionType(("str",)))),
        ("Sequence[int]", Sequence[int], OptionType(item=OptionType(("int",)))),
        ("dict[str, Any] | str", dict[str, Any] | str, OptionType(("dict", "str"))),
        ("Literal['a', 'b']", Literal["a", "b"], OptionType(choices=("a", "b"))),
        ("Path", Path, OptionType(("str",))),
        ("Pace", Pace, PACE),
        ("Pace | str", Pace | str, PACE),
        ("list", list, OptionType(item=OptionType(("any",)))),
        ("Pace | list[str] | str", Pace | list[str] | str, OptionType(choices=("slow", "fast"), item=PACE)),
        ("float | list[float] | str", float | list[float] | str, OptionType(("float",), item=OptionType(("float",)))),
        ("str | list[str] | None", str | list[str] | None, OptionType(("str", "none"), item=OptionType(("str",)))),
    ],
)
def test_annotation_and_live_type_mean_the_same(text, live, kind):
    assert annotated(text) == kind
    assert kind_of_type(live) == kind


@pytest.mark.parametrize(
    ("hint", "value", "invalid_items"),
    [
        (Literal["a", "b"], "a", []),
        (Literal["a", "b"], "c", ["c"]),
        (Literal["a", "b"], None, [None]),
        (Literal["a", "b"] | None, None, []),
        (Literal["a", "b"] | bool, True, []),
        (Literal["a", "b"] | bool, 1, [1]),
        (Literal[1, 2], True, [True]),
        (list[Literal["a", "b"]] | Literal["a", "b"], ["a", "c", "b", "d"], ["c", "d"]),
        (list[Literal["a", "b"]] | Literal["a", "b"], ("a",), []),
        (Literal["a", "b"], ["a"], [["a"]]),
        (Pace | str, Pace.FAST, []),
        (Pace | str, "fats", ["fats"]),
        (float, 3, []),
        (int, True, [True]),
        (str | list[Pace], "both of them", []),
        (Any, True, []),
    ],
)
def test_what_does_not_fit(hint, value, invalid_items):
    assert kind_of_type(hint).invalid_items(value) == invalid_items


class Road:
    """A class that a hint names beside choices."""


@dataclass
class Journey:
    pace: "Pace | str" = "slow"
    road: 'Literal["high", "low"] | Road' = "low"
    stops: 'list[Literal["inn", "well"]] | None' = None
    name: str = "any"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pace": Pace.FAST},
        {"pace": "fast"},
        {"road": Road()},
        {"stops": ["inn", "inn"]},
        {"stops": []},
        {"name": "x"},
    ],
)
def test_choices_are_taken(given):
    check_choices(Journey(**given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pace": "fats"}, r"Unknown pace 'fats'\. Did you mean 'fast'\? Known: slow, fast\."),
        ({"pace": None}, r"Unknown pace 'None'\. Known: slow, fast\."),
        ({"road": "hihg"}, r"Unknown road 'hihg'\. Did you mean 'high'\? Known: high, low\."),
        ({"road": ["high"]}, "Unknown road"),
        ({"stops": ["inn", "wel"]}, r"Unknown stops 'wel'\. Did you mean 'well'\? Known: inn, well\."),
        ({"stops": "inn"}, "Unknown stops 'inn'"),
    ],
)
def test_other_values_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        check_choices(Journey(**given))


def test_types_that_a_parser_writes_into_fields_do_not_count():
    @dataclass
    class Parsed:
        stops: str | list[Literal["inn", "well"]] = ""

    HfArgumentParser(Parsed)
    assert dataclasses.fields(Parsed)[0].type == list[Literal["inn", "well"]]
    check_choices(Parsed())
    with pytest.raises(ConfigError, match="Unknown stops 'wel'"):
        check_choices(Parsed(["wel"]))


def test_hints_that_cannot_be_resolved_are_no_choices():
    """Names that a hint takes from elsewhere, or that are not there while the program runs, admit everything."""
    check_choices(
        make_dataclass("Made", [("far", "Nowhere | list[Elsewhere]"), ("near", ForwardRef("Nowhere") | None)])(3, "x")
    )
