"""Arguments in docstrings as tables: lines of a name, two spaces and what it is become a table on the API page."""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Class, Extension, Object

_ENTRY = re.compile(r"(\w+(?:, \w+)*) {2,}(\S.*)")


class Arguments(Extension):
    """Called by griffe for every class and function of the package."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring; a dataclass whose fields are documented below them gets a table of those."""
        if obj.docstring is not None:
            obj.docstring.value = with_tables(obj.docstring.value)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Add the fields of a dataclass."""
        fields = [_field(member) for member in cls.attributes.values() if _is_field(member)] if _is_data(cls) else []
        if cls.docstring is not None and fields:
            cls.docstring.value += "\n\n" + "\n".join(["| field | default | |", "|---|---|---|", *fields])


def with_tables(text: str) -> str:
    """The docstring, paragraphs of aligned arguments being tables."""
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", text)))


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if not _ENTRY.match(lines[0]):
        return text
    rows: list[list[str]] = []
    for line in lines:
        if found := _ENTRY.match(line):
            rows.append([f"`{found[1]}`".replace(", ", "`, `"), found[2]])
        else:
            rows[-1][1] += " " + line.strip()
    return "\n".join(["| | |", "|---|---|", *("| " + " | ".join(_cells(row)) + " |" for row in rows)])


def _cells(row: list[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]


def _is_data(cls: Class) -> bool:
    return any("dataclass" in str(decorator.value) for decorator in cls.decorators)


def _is_field(member: Attribute) -> bool:
    return member.docstring is not None and not member.name.isupper() and "ClassVar" not in str(member.annotation)


def _field(member: Attribute) -> str:
    default = "" if member.value is None else f"`{member.value}`"
    assert member.docstring is not None
    return "| " + " | ".join(_cells([f"`{member.name}`", default, " ".join(member.docstring.value.split())])) + " |"
