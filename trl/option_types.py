"""Types of options: parse type hints, from a type or from the syntax tree of an annotation, and check values against them.

    kind_of_type(Literal["a", "b"] | None)        OptionType(scalars=("none",), choices=("a", "b"))

The command line uses the syntax tree to show and check options without importing torch; dataclasses use `check_choices`.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from numbers import Integral
from typing import Any

from trl.errors import ConfigError, unknown

_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "dict": (Mapping,),
    "none": (types.NoneType,),
    "any": (object,),
}
_PLAIN = (str, int, float, list, tuple, types.NoneType)
"""Types of values that are checked against choices. Other objects may be of a class that the hint admits as well."""
_ALSO = {"None": "none", "Mapping": "dict", "Dict": "dict", "Any": "any", "Path": "str"}
_LISTS = ("list", "List", "Sequence", "tuple", "Tuple")


@dataclass(frozen=True)
class OptionType:
    """Any of the `scalars` ("int", "none", …), or one of the `choices`, or a list of `item`s."""

    scalars: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    item: OptionType | None = None

    def __or__(self, other: OptionType) -> OptionType:
        return OptionType(
            tuple(dict.fromkeys(self.scalars + other.scalars)),
            tuple(dict.fromkeys(self.choices + other.choices)),
            self.item or other.item,
        )

    @property
    def names(self) -> tuple[Any, ...]:
        """The choices for the value, or for the entries of a list."""
        return self.choices or (self.item.names if self.item else ())

    def invalid_items(self, value: Any) -> list[Any]:
        """Values that are not of this type: `value` itself, or those of its entries if it is a list."""
        if self.item is not None and isinstance(value, list | tuple):
            return [misfit for entry in value for misfit in self.item.invalid_items(entry)]
        value = value.value if isinstance(value, enum.Enum) else value
        if any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices):
            return []
        admitted = {"bool", "any"} & set(self.scalars) if isinstance(value, bool) else self.scalars
        return [] if isinstance(value, tuple(t for name in admitted for t in _TYPES[name])) else [value]

    def __str__(self) -> str:
        """Description for messages: `an int or none`, `one of 'no', 'steps', 'epoch'`, `a list of str`."""
        several = self.item is not None and self.item == OptionType(choices=self.choices)
        count = "one or several" if several else "one"
        parts = [f"{count} of {', '.join(map(repr, self.choices))}"] if self.choices else []
        parts += [_SPOKEN[name] for name in self.scalars if name not in ("none", "any")]
        parts += [f"a list ({self.item})"] if self.item and not several else []
        parts += ["none"] if "none" in self.scalars else []
        return " or ".join(parts) or "a value"


_SPOKEN = {"bool": "true or false", "int": "an int", "float": "a float", "str": "text", "dict": "a JSON object"}
ANYTHING = OptionType(("any",))


def kind_of_annotation(node: ast.expr, resolve: Callable[[str], OptionType | None]) -> OptionType:
    """OptionType of an annotation's syntax tree. `resolve(name)` returns that of a name that is not built in, or None."""
    match node:
        case ast.Constant(value=str(text)):
            return kind_of_annotation(ast.parse(text, mode="eval").body, resolve)
        case ast.Constant(value=None):
            return OptionType(("none",))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([kind_of_annotation(left, resolve), kind_of_annotation(right, resolve)])
        case ast.Subscript(value=head, slice=inside):
            return _kind_of_subscript(last_name(head), inside, resolve)
    return _kind_of_name(last_name(node), resolve)


def _kind_of_subscript(head: str, inside: ast.expr, resolve: Callable[[str], OptionType | None]) -> OptionType:
    parts = list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]
    if head == "Literal":
        return OptionType(choices=tuple(part.value for part in parts if isinstance(part, ast.Constant)))
    if head in ("Optional", "Union"):
        kinds = [kind_of_annotation(part, resolve) for part in parts]
        return _union([*kinds, OptionType(("none",))] if head == "Optional" else kinds)
    if head == "InitVar":
        return kind_of_annotation(parts[0], resolve)
    if head in _LISTS:
        return OptionType(item=kind_of_annotation(parts[0], resolve))
    return _kind_of_name(head, resolve)


def _kind_of_name(name: str, resolve: Callable[[str], OptionType | None]) -> OptionType:
    name = _ALSO.get(name, name)
    if name == "any":
        return ANYTHING
    if name in _LISTS:
        return OptionType(item=ANYTHING)
    return OptionType((name,)) if name in _TYPES else resolve(name) or OptionType(("dict",))


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def kind_of_type(annotation: Any) -> OptionType:
    """OptionType of a type object."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _union([kind_of_type(a) for a in arguments])
    if origin is typing.Literal:
        return OptionType(choices=arguments)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return OptionType(choices=tuple(member.value for member in annotation))
    if origin is not None and origin.__name__ in _LISTS:
        return OptionType(item=kind_of_type(arguments[0]))
    if annotation in (None, type(None)):
        return OptionType(("none",))
    named = origin or annotation
    return _kind_of_name(named.__name__ if isinstance(named, type) else "", lambda name: None)


def _union(kinds: Sequence[OptionType]) -> OptionType:
    """Union of `kinds`. A `str` next to string choices, or next to numbers and lists of them, is dropped: hints have it only
    because `HfArgumentParser` needs a `str` in unions of other types, and lists of `str`."""
    merged = kinds[0]
    for kind in kinds[1:]:
        merged = merged | kind
    item = merged.item
    texts = any(isinstance(choice, str) for choice in merged.choices)
    if texts and item == OptionType(("str",)):
        merged = replace(merged, item=OptionType(choices=merged.choices))
    numbers = item is not None and item.scalars and "str" not in item.scalars and {*item.scalars} <= {*merged.scalars}
    if texts or numbers:
        merged = replace(merged, scalars=tuple(name for name in merged.scalars if name != "str"))
    return merged


# ---- of a dataclass ----


@cache
def kinds_of(cls: type) -> dict[str, OptionType]:
    """OptionType of each field of a dataclass. A name in a hint that its module does not define is taken for a dict."""
    return {field.name: _kind_of_field(cls, field) for field in settable(cls)}


LIBRARIES = ("trl", "trlx", "transformers")
"""Packages whose options have the same meaning, and range, wherever they are declared."""


@cache
def library_kinds(cls: type) -> dict[str, OptionType]:
    """`kinds_of` without the fields that only a script's subclass declares, which mean what the script says."""
    names = {name for base in cls.__mro__ if _is_of_library(base) for name in inspect.get_annotations(base)}
    return {name: kind for name, kind in kinds_of(cls).items() if name in names}


def _is_of_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in LIBRARIES


def declared(cls: type, name: str) -> tuple[type, Any]:
    """The class that declares a field, and its annotation there. `field.type` is no use: `transformers`' parser overwrites it."""
    home = next(base for base in cls.__mro__ if name in inspect.get_annotations(base))
    return home, inspect.get_annotations(home)[name]


def _kind_of_field(cls: type, field: dataclasses.Field) -> OptionType:
    home, annotation = declared(cls, field.name)
    if not isinstance(annotation, str):
        return kind_of_type(annotation)
    names = vars(sys.modules[home.__module__])
    return kind_of_annotation(
        ast.parse(annotation, mode="eval").body, lambda name: kind_of_type(names[name]) if name in names else None
    )


def check_choices(subject: Any) -> None:
    """Raise ConfigError for the first field of a dataclass whose value is not among the choices of its type hint.

    The default of a script's own field is right, whatever its hint.
    """
    cls = type(subject)
    for field, kind in kinds_of(cls).items():
        value = getattr(subject, field)
        is_right = field not in library_kinds(cls) and value is getattr(cls, field, dataclasses.MISSING)
        invalid_items = kind.invalid_items(value) if kind.names and not is_right else []
        for misfit in (each for each in invalid_items if isinstance(each, _PLAIN)):
            raise ConfigError(unknown(field, str(misfit), map(str, kind.names)))


def make_plain(config: Any) -> None:
    """Turn paths into text, and whole numbers of other types (1e3, those of numpy) into ints, in options that take these."""
    for name, kind in library_kinds(type(config)).items():
        value = getattr(config, name, None)
        if isinstance(value, os.PathLike) and "str" in kind.scalars:
            setattr(config, name, os.fspath(value))
        is_whole = value.is_integer() if isinstance(value, float) else isinstance(value, Integral)
        if is_whole and "int" in kind.scalars and kind.invalid_items(value):
            setattr(config, name, int(value))


# ---- documentation of fields ----


def documented(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """Each statement with the string literal that follows it, or ""."""
    for statement, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        match after:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield statement, joined(text)
            case _:
                yield statement, ""


def joined(text: str) -> str:
    """Join the lines of a text."""
    return " ".join(text.split())


def documentation_of(cls: type) -> dict[str, str]:
    """Field docstrings of a class and its bases, by name; classes without source code are left out."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        for statement, text in documented(ast.parse(source).body[0].body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and text:
                found[statement.target.id] = text
    return found


def settable(cls: type) -> list[dataclasses.Field]:
    """The fields of a dataclass, and those of its `InitVar`s that have a docstring.

    `HfArgumentParser` ignores an `InitVar`, so it can parse two dataclasses that have an option of the same name.
    """
    fields, parameters = dataclasses.fields(cls), inspect.signature(cls.__init__).parameters
    others = (cls.__dataclass_fields__.keys() & parameters.keys()) - {field.name for field in fields}
    others &= documentation_of(cls).keys() if others else set()
    return [field for name, field in cls.__dataclass_fields__.items() if field in fields or name in others]


@cache
def describe_fields(cls: type) -> str:
    """Text with every field of a dataclass, its type, default and documentation; fields of the class itself come first."""
    texts, fields = documentation_of(cls), {field.name: field for field in settable(cls) if field.init}
    lines = []
    for base in cls.__mro__:
        for name in inspect.get_annotations(base):
            if (field := fields.pop(name, None)) is not None:
                default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
                _, hint = declared(cls, name)
                hint = hint if isinstance(hint, str) else inspect.formatannotation(hint)
                text = joined(field.metadata.get("help") or texts.get(name, ""))
                lines += [
                    f"{name}: {hint}{default}",
                    *textwrap.wrap(text, 112, initial_indent="    ", subsequent_indent="    "),
                ]
    return "\n".join(lines)
