"""What an option may be given: from a type annotation to the values it admits, and from text to a value.

A `Kind` is read either from an annotation's syntax tree (`kind_of_annotation`: nothing is imported) or from a live type
(`kind_of_type`). Values come as words of the command line (`from_words`) or as data of a YAML file (`from_data`).
"""

from __future__ import annotations

import ast
import enum
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
NONE = ("none", "null")

SCALARS = ("bool", "int", "float", "str", "dict", "none")
_ALSO = {"None": "none", "Mapping": "dict", "Dict": "dict", "Any": "any", "Path": "str"}
_LISTS = ("list", "List", "Sequence", "tuple", "Tuple")


class Mismatch(Exception):
    """A value that is not of a kind. `str(error)` says what was expected."""


@dataclass(frozen=True)
class Kind:
    """Any of the `scalars` ("int", "none", …), or one of the `choices`, or a list of `item`s."""

    scalars: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    item: Kind | None = None

    def __or__(self, other: Kind) -> Kind:
        return Kind(
            tuple(dict.fromkeys(self.scalars + other.scalars)),
            tuple(dict.fromkeys(self.choices + other.choices)),
            self.item or other.item,
        )

    def __str__(self) -> str:
        """For people: `an int or none`, `one of 'no', 'steps', 'epoch'`, `a list of str`."""
        several = self.item is not None and self.item == Kind(choices=self.choices)
        count = "one or several" if several else "one"
        parts = [f"{count} of {', '.join(map(repr, self.choices))}"] if self.choices else []
        parts += [_SPOKEN[name] for name in self.scalars if name not in ("none", "any")]
        parts += [f"a list ({self.item})"] if self.item and not several else []
        parts += ["none"] if "none" in self.scalars else []
        return " or ".join(parts) or "a value"


_SPOKEN = {"bool": "true or false", "int": "an int", "float": "a float", "str": "text", "dict": "a JSON object"}
TEXT = Kind(("str",))
ANYTHING = Kind(("any",))


# ---- from annotations and types ----


def kind_of_annotation(node: ast.expr, resolve: Callable[[str], Kind | None]) -> Kind:
    """The kind that an annotation says. `resolve(name)` gives that of a name which is not built in, or None."""
    match node:
        case ast.Constant(value=str(text)):
            return kind_of_annotation(ast.parse(text, mode="eval").body, resolve)
        case ast.Constant(value=None):
            return Kind(("none",))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([kind_of_annotation(left, resolve), kind_of_annotation(right, resolve)])
        case ast.Subscript(value=head, slice=inside):
            return _kind_of_subscript(_last_name(head), inside, resolve)
    return _kind_of_name(_last_name(node), resolve)


def _kind_of_subscript(head: str, inside: ast.expr, resolve: Callable[[str], Kind | None]) -> Kind:
    parts = list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]
    if head == "Literal":
        return Kind(choices=tuple(part.value for part in parts if isinstance(part, ast.Constant)))
    if head in ("Optional", "Union"):
        kinds = [kind_of_annotation(part, resolve) for part in parts]
        return _union([*kinds, Kind(("none",))] if head == "Optional" else kinds)
    if head in _LISTS:
        return Kind(item=kind_of_annotation(parts[0], resolve))
    return _kind_of_name(head, resolve)


def _kind_of_name(name: str, resolve: Callable[[str], Kind | None]) -> Kind:
    name = _ALSO.get(name, name)
    if name == "any":
        return ANYTHING
    if name in _LISTS:
        return Kind(item=ANYTHING)
    return Kind((name,)) if name in SCALARS else resolve(name) or Kind(("dict",))


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def kind_of_type(annotation: Any) -> Kind:
    """The kind that a live type says."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _union([kind_of_type(a) for a in arguments])
    if origin is typing.Literal:
        return Kind(choices=arguments)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Kind(choices=tuple(member.value for member in annotation))
    if origin is not None and origin.__name__ in _LISTS:
        return Kind(item=kind_of_type(arguments[0]))
    if annotation in (None, type(None)):
        return Kind(("none",))
    return _kind_of_name((origin or annotation).__name__, lambda name: None)


def _union(kinds: Sequence[Kind]) -> Kind:
    """Any of `kinds`. `SomeEnum | str` means the texts of the enumeration, and not any text."""
    merged = kinds[0]
    for kind in kinds[1:]:
        merged = merged | kind
    if any(isinstance(choice, str) for choice in merged.choices):
        merged = replace(merged, scalars=tuple(name for name in merged.scalars if name != "str"))
    return merged


# ---- from words of the command line ----


def from_words(kind: Kind, words: Sequence[str]) -> Any:
    """The value that `words` spell. Raises Mismatch."""
    if kind.item is None or (len(words) == 1 and _is_scalar_word(kind, words[0])):
        return from_word(kind, words[0])
    if len(words) == 1 and words[0].startswith("["):
        return from_data(kind, _json(kind, words[0]))
    return [from_word(kind.item, word) for word in words]


def _is_scalar_word(kind: Kind, word: str) -> bool:
    """Whether a lone word for a kind with lists is not a list of one."""
    if "none" in kind.scalars and word.lower() in NONE:
        return True
    if word.startswith("["):
        return False
    return "str" in kind.scalars or bool(kind.choices) or ("dict" in kind.scalars and word.startswith("{"))


def from_word(kind: Kind, word: str) -> Any:
    """The value that one word spells, by the first of: none, a choice, bool, int, float, JSON object, text."""
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


def _json(kind: Kind, word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError as error:
        raise Mismatch(f"{kind}, and this is not JSON ({error.msg} at character {error.pos})") from None


# ---- from data of a file ----


def from_data(kind: Kind, value: Any) -> Any:
    """`value`, checked. Text that spells a number is one; `no` and `off`, which YAML reads as false, may be choices."""
    if isinstance(value, str):
        return from_words(kind, [value])
    if value is None and "none" in kind.scalars:
        return None
    if value is False and not {"bool", "any"} & set(kind.scalars):
        for word in ("no", "off"):
            if word in kind.choices:
                return word
    if isinstance(value, list) and kind.item is not None:
        return [from_data(kind.item, each) for each in value]
    if _is_of(kind, value):
        return value
    raise Mismatch(str(kind))


def _is_of(kind: Kind, value: Any) -> bool:
    if "any" in kind.scalars or any(value == c and type(value) is type(c) for c in kind.choices):
        return True
    if isinstance(value, bool):
        return "bool" in kind.scalars
    if isinstance(value, int):
        return bool({"int", "float"} & set(kind.scalars))
    if isinstance(value, Mapping):
        return "dict" in kind.scalars
    return isinstance(value, float) and "float" in kind.scalars
