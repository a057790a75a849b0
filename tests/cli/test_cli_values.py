"""Values spelt in words and in data."""

import ast

import pytest

from trl.cli.values import Mismatch, from_data, from_words
from trl.option_types import OptionType, kind_of_annotation

PACE = OptionType(choices=("slow", "fast"))


def annotated(text: str) -> OptionType:
    return kind_of_annotation(ast.parse(text, mode="eval").body, {"Pace": PACE}.get)


@pytest.mark.parametrize(
    ("annotation", "words", "value"),
    [
        ("int", ["-1"], -1),
        ("float", ["1e-5"], 1e-5),
        ("int | str", ["8"], 8),
        ("int | str", ["auto"], "auto"),
        ("str", ["8"], "8"),
        ("str", ["none"], "none"),
        ("str | None", ["None"], None),
        ("bool", ["No"], False),
        ("bool | None", ["null"], None),
        ("str | bool", ["no"], False),
        ("str | bool", ["all"], "all"),
        ("dict | str | None", ['{"a": [1]}'], {"a": [1]}),
        ("dict | str | None", ["file.json"], "file.json"),
        ("list[str]", ["a"], ["a"]),
        ("list[float]", ["0.5", "1"], [0.5, 1.0]),
        ("list[int]", ["[1, 2]"], [1, 2]),
        ("str | list[str]", ["a"], "a"),
        ("str | list[str]", ["a", "b"], ["a", "b"]),
        ("list[str] | None", ["none"], None),
        ("list[Other]", ['{"path": "a"}', '{"path": "b"}'], [{"path": "a"}, {"path": "b"}]),
        ("Pace | str", ["fast"], "fast"),
        ("str | None | Literal[False]", ["false"], False),
    ],
)
def test_words_spell_values(annotation, words, value):
    found = from_words(annotated(annotation), words)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("annotation", "value", "checked"),
    [
        ("float", "1e-5", 1e-5),  # YAML reads 1e-5 as text
        ("float", 3, 3),
        ("int | None", 1e3, 1000),
        ("int | None", None, None),
        ("Literal['no', 'steps']", False, "no"),  # YAML reads `no` as false
        ("dict", {"a": 1}, {"a": 1}),
        ("list[float]", [1, 0.5], [1, 0.5]),
        ("list[str]", "a", ["a"]),
        ("bool", True, True),
        ("Any", 3, 3),
    ],
)
def test_data_is_checked(annotation, value, checked):
    assert from_data(annotated(annotation), value) == checked


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        ("int", 1.5, "an int"),
        ("int", True, "an int"),
        ("str", 5, "text"),
        ("bool", 1, "true or false"),
        ("int | None", [1], "an int or none"),
        ("list[int]", ["a"], "an int"),
        ("Pace", "fats", "one of 'slow', 'fast'"),
        ("dict", "{a", "this is not JSON"),
    ],
)
def test_other_values_are_refused(annotation, value, expected):
    with pytest.raises(Mismatch, match=expected):
        from_data(annotated(annotation), value)
