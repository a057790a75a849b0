"""Tables of options, made from the source: a line `[[options module:Class]]` becomes the table of that configuration.

Options in sentences (`--packing`) stay on one line.
"""

from __future__ import annotations

import re
from typing import Any

from trl.cli.commands import MODEL, SCRIPT, methods
from trl.cli.fields import REQUIRED, Option, options_in_source
from trl.cli.source import COMPUTED

_LINE = re.compile(r"^\[\[options ([\w.]+:\w+)\]\]$", re.MULTILINE)
_ALL = "[[options of every command]]"
_OPTION = re.compile(r"--\w[\w-]*")
_CODE = re.compile(r"(?<!<pre>)(?<!</span>)<code>[^<\n]*--[^<\n]*</code>")
BASES = ("TrainingArguments",)
"""Classes whose options are documented elsewhere."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    if _ALL in markdown:
        markdown = markdown.replace(_ALL, "\n\n".join(map(_section, _classes())))
    return _LINE.sub(lambda match: table(match[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for every page once it is HTML."""
    return _CODE.sub(lambda code: _OPTION.sub(lambda name: f'<span class="option">{name[0]}</span>', code[0]), html)


def _classes() -> list[str]:
    """References of all configurations that commands take, each once."""
    found = [
        SCRIPT,
        MODEL,
        *(reference for method in methods().values() for reference in (method.config, method.extra)),
    ]
    return list(dict.fromkeys(filter(None, found)))


def _section(reference: str) -> str:
    return f"## {reference.rpartition(':')[2]}\n\n{table(reference)}"


def table(reference: str) -> str:
    """A row for each option of the class that is not one of `transformers.TrainingArguments` as it stands there."""
    rows = [_row(option) for option in options_in_source(reference) if option.owner not in BASES]
    return "\n".join(["| option | takes | default | what it does |", "|---|---|---|---|", *rows])


def _row(option: Option) -> str:
    cells = (f"`{option.name}`", str(option.kind), _default(option.default), option.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    return "" if value is COMPUTED else f"`{value!r}`"
