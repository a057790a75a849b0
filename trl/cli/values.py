"""Convert words of the command line, and data of YAML files, to values of an option type (see `trl.option_types`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trl.option_types import OptionType

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
NONE = ("none", "null")


class Mismatch(Exception):
    """A value that does not have the option's type. `str(error)` says what was expected."""


# ---- from words of the command line ----


def from_words(kind: OptionType, words: Sequence[str]) -> Any:
    """Convert words of the command line to a value. Raises Mismatch."""
    if kind.item is None or (len(words) == 1 and _is_scalar_word(kind, words[0])):
        return from_word(kind, words[0])
    if len(words) == 1 and words[0].startswith("["):
        return from_data(kind, _json(kind, words[0]))
    # A shell leaves the comma in words such as `--lora_target_modules "q_proj", "v_proj"`.
    return [from_word(kind.item, word.removesuffix(",") or word) for word in words]


def _is_scalar_word(kind: OptionType, word: str) -> bool:
    """True if a single word is a scalar, for an option that takes lists as well as scalars; False: a list of one."""
    if "none" in kind.scalars and word.lower() in NONE:
        return True
    if word.startswith("["):
        return False
    return "str" in kind.scalars or bool(kind.choices) or ("dict" in kind.scalars and word.startswith("{"))


def from_word(kind: OptionType, word: str) -> Any:
    """Convert one word to the first type that fits: none, a choice, bool, int, float, JSON object, text."""
    lower = word.lower()
    if lower in NONE and "none" in kind.scalars:
        return None
    for choice in kind.choices:
        if word == str(choice) or (isinstance(choice, bool) and lower in (TRUE if choice else FALSE)):
            return choice
    if "bool" in kind.scalars and lower in TRUE + FALSE:
        return lower in TRUE
    for name, number in (("int", int), ("float", float)):
        if name in kind.scalars and _spells(number, word):
            return number(word)
    if word.startswith("{") and {"dict", "any"} & set(kind.scalars):
        return _json(kind, word)
    if {"str", "any"} & set(kind.scalars):
        return word
    raise Mismatch(str(kind))


def _spells(number: type, word: str) -> bool:
    try:
        number(word)
    except ValueError:
        return False
    return True


def _json(kind: OptionType, word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError as error:
        raise Mismatch(f"{kind}, and this is not JSON ({error.msg} at character {error.pos})") from None


# ---- from data of a file ----


def from_data(kind: OptionType, value: Any) -> Any:
    """Check a value from a YAML file, and convert text to the option's type. Raises Mismatch.

    YAML reads `no` and `off` as false; they become text again where they are choices of the option.
    """
    if isinstance(value, str):
        return from_words(kind, [value])
    if value is None and "none" in kind.scalars:
        return None
    if value is False and not {"bool", "any"} & set(kind.scalars):
        for word in ("no", "off"):
            if word in kind.choices:
                return word
    if isinstance(value, float) and value.is_integer() and kind.invalid_items(value) and "int" in kind.scalars:
        return int(value)
    if isinstance(value, list) and kind.item is not None:
        return [from_data(kind.item, each) for each in value]
    if not kind.invalid_items(value):
        return value
    raise Mismatch(str(kind))
