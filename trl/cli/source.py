"""Read modules without importing them: look up names, and evaluate simple expressions, in their syntax trees.

The command line shows and checks options faster than torch can be imported, so it parses the files that declare them.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

COMPUTED = object()
"""Stands for a value that the source computes, so that it cannot be read without running code."""

HOMES = {("transformers", "TrainingArguments"): "transformers.training_args"}
"""Modules that define classes which their package exports lazily."""

READ = ("trl", "transformers")
"""Packages whose files are read; names from other packages are not resolved."""


@dataclass(frozen=True)
class Module:
    """The top level of a file: definitions by name, and imported names with their module and original name."""

    name: str
    definitions: dict[str, ast.AST]
    imports: dict[str, tuple[str, str]]


def locate(name: str) -> Path | None:
    """The file of a module, found without importing anything."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    stem = Path(spec.origin).parent.joinpath(*rest)
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


@cache
def read_module(name: str) -> Module | None:
    path = locate(name)
    if path is None:
        return None
    module = Module(name, {}, {})
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for statement in _statements(ast.parse(path.read_text(encoding="utf-8")).body):
        _enter(module, statement, package)
    return module


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _statements(statement.body)
        else:
            yield statement


def _enter(module: Module, statement: ast.stmt, package: str) -> None:
    match statement:
        case ast.ClassDef(name=name):
            module.definitions[name] = statement
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            module.definitions[name] = value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            module.definitions[name] = value
        case ast.ImportFrom(module=origin, names=names, level=level):
            parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            home = ".".join([*parents, *([origin] if origin else [])])
            for each in names:
                module.imports[each.asname or each.name] = (home, each.name)


def lookup(module: Module, name: str) -> tuple[Module, ast.AST] | None:
    """The definition that `name` refers to in `module`, and the module that contains it; None if it cannot be read."""
    if name in module.definitions:
        return module, module.definitions[name]
    if name not in module.imports:
        return None
    home, original = module.imports[name]
    home = HOMES.get((home, original), home)
    if home.partition(".")[0] not in READ:
        return None
    origin = read_module(home)
    return None if origin is None else lookup(origin, original)


def ancestry(module: Module, cls: ast.ClassDef) -> list[tuple[Module, ast.ClassDef]]:
    """The class and its base classes, nearest first, as far as their sources can be read."""
    line = [(module, cls)]
    for base in cls.bases:
        found = lookup(module, base.id) if isinstance(base, ast.Name) else None
        if found is not None and isinstance(found[1], ast.ClassDef):
            line += ancestry(*found)
    names = [ancestor.name for _, ancestor in line]
    return [pair for i, pair in enumerate(line) if pair[1].name not in names[i + 1 :]]


def class_constant(module: Module, cls: ast.ClassDef, name: str) -> Any:
    """The value of the class attribute `name`, own or inherited, or COMPUTED."""
    for home, ancestor in ancestry(module, cls):
        for statement in ancestor.body:
            match statement:
                case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) if found == name:
                    return value_of(value, home)
                case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                    return value_of(value, home)
    return COMPUTED


def value_of(node: ast.AST, module: Module) -> Any:
    """Evaluate an expression made of literals, names and dicts. Return COMPUTED for anything else."""
    try:
        return _evaluate(node, module)
    except ValueError:
        return COMPUTED


def _evaluate(node: ast.AST, module: Module) -> Any:
    """Raises ValueError for an expression that cannot be evaluated without running code."""
    match node:
        case ast.Dict():
            made: dict[Any, Any] = {}
            for key, value in zip(node.keys, node.values, strict=True):
                found = _evaluate(value, module)
                made |= found if key is None else {_evaluate(key, module): found}
            return made
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _evaluate(left, module) | _evaluate(right, module)
        case ast.Name(id=name):
            if (found := lookup(module, name)) is not None:
                return _evaluate(found[1], found[0])
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            found = lookup(module, owner)
            if found is not None and isinstance(found[1], ast.ClassDef):
                value = class_constant(*found, name)
                if value is not COMPUTED:
                    return value
    return ast.literal_eval(node)
