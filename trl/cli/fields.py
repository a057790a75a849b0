"""Turn the fields of configuration dataclasses into command-line options, from source code or from imported classes.

A field is documented once, by a string literal below it (or `metadata={"help": …}` as in `transformers`):

    max_length: int | None = 1024
    \"\"\"Tokens per row; longer rows are cut.\"\"\"

`options_in_source("trl.trainers.sft:SFTConfig")` parses the source and imports nothing; `options_of(cls)` takes a
class.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, replace
from functools import partial
from typing import Any

from trl.cli.source import COMPUTED, Module, ancestry, class_constant, lookup, read_module, value_of
from trl.option_types import (
    ANYTHING,
    OptionType,
    documentation_of,
    documented,
    joined,
    kind_of_annotation,
    kinds_of,
    last_name,
    settable,
)

REQUIRED = object()
"""Stands for the default of an option that has none, and so must be given."""


@dataclass(frozen=True)
class Option:
    """One option: its name, type, default, documentation, and the class that declares it."""

    name: str
    kind: OptionType = ANYTHING
    default: Any = COMPUTED
    help: str = ""
    owner: str = ""

    @property
    def summary(self) -> str:
        """The first sentence of the documentation."""
        return re.split(r"(?<=[a-z)`'])\.\s+(?=[A-Z`'\"])", self.help, maxsplit=1)[0].rstrip(".") + "."


def merge_options(*groups: list[Option]) -> list[Option]:
    """The options of several classes. An option that several declare is taken from the first of them."""
    merged: dict[str, Option] = {}
    for option in (option for group in groups for option in group):
        merged.setdefault(option.name, option)
    return list(merged.values())


# ---- from source ----


def options_in_source(reference: str) -> list[Option]:
    """The options of the dataclass `"module:Class"`, base classes first, read from source without importing
    anything."""
    found: dict[str, Option] = {}
    for module, cls in reversed(ancestry(*_class_in_source(reference))):
        for option in _options_in_body(module, cls, found):
            found[option.name] = option
    return list(found.values())


def aliases_in_source(reference: str) -> Mapping[str, str]:
    """`ALIASES` of the dataclass `"module:Class"`: a map from old option names to current ones."""
    aliases = class_constant(*_class_in_source(reference), "ALIASES")
    return {} if aliases is COMPUTED else aliases


def _class_in_source(reference: str) -> tuple[Module, ast.ClassDef]:
    name, _, class_name = reference.partition(":")
    module = read_module(name)
    assert module is not None, f"{name} has no source file"
    found = lookup(module, class_name)
    assert found is not None, f"{name} has no class {class_name}"
    return found


def _options_in_body(module: Module, cls: ast.ClassDef, inherited: Mapping[str, Option]) -> Iterator[Option]:
    for statement, documentation in documented(cls.body):
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                option = _option(module, name, annotation, value)
                if option is None or (_head(annotation) == "InitVar" and not documentation):
                    continue
                before = inherited.get(name)
                text = documentation or option.help or (before.help if before else "")
                yield replace(option, help=text, owner=cls.name)
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in inherited:
                yield replace(inherited[name], default=value_of(value, module))


def _option(module: Module, name: str, annotation: ast.expr, value: ast.expr | None) -> Option | None:
    if name.startswith("_") or _head(annotation) == "ClassVar":
        return None
    kind = kind_of_annotation(annotation, partial(_kind_in_source, module))
    if value is None:
        return Option(name, kind, REQUIRED)
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field"):
        return Option(name, kind, value_of(value, module))
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    if "init" in given and value_of(given["init"], module) is False:
        return None
    return Option(name, kind, _default(given, module), _help_in(given.get("metadata")))


def _help_in(metadata: ast.expr | None) -> str:
    """The `help` of a field's metadata."""
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            match key, value:
                case ast.Constant(value="help"), ast.Constant(value=str(text)):
                    return joined(text)
    return ""


def _head(annotation: ast.expr) -> str:
    return last_name(annotation.value if isinstance(annotation, ast.Subscript) else annotation)


def _default(given: Mapping[str | None, ast.expr], module: Module) -> Any:
    if "default" in given:
        return value_of(given["default"], module)
    match given.get("default_factory"):
        case None:
            return REQUIRED
        case ast.Name(id="list"):
            return []
        case ast.Name(id="dict"):
            return {}
        case ast.Lambda(body=body):
            return value_of(body, module)
    return COMPUTED


def _kind_in_source(module: Module, name: str) -> OptionType | None:
    """The option type that a name in a module refers to: the values of an enumeration, or a type alias."""
    found = lookup(module, name)
    if found is None:
        return None
    home, node = found
    if not isinstance(node, ast.ClassDef):
        return kind_of_annotation(node, partial(_kind_in_source, home))
    if not any(_head(base).endswith("Enum") for base in node.bases):
        return None
    values = [value_of(s.value, home) for s in node.body if isinstance(s, ast.Assign)]
    return OptionType(choices=tuple(value for value in values if value is not COMPUTED))


# ---- from live classes ----


def options_of(cls: type) -> list[Option]:
    """The options of a dataclass."""
    documentation, kinds = documentation_of(cls), kinds_of(cls)
    return [
        Option(
            field.name,
            kinds[field.name],
            _live_default(field),
            joined(field.metadata.get("help") or documentation.get(field.name, "")),
            cls.__name__,
        )
        for field in settable(cls)
        if field.init and not field.name.startswith("_")
    ]


def _live_default(field: dataclasses.Field) -> Any:
    if field.default is not MISSING:
        return field.default
    return REQUIRED if field.default_factory is MISSING else field.default_factory()
