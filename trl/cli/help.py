"""Help screens: options grouped under headings, coloured in a terminal and plain when redirected."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trl.cli.fields import REQUIRED, Option
from trl.cli.source import COMPUTED
from trl.cli.themes import by_theme, is_common
from trl.cli.values import OptionType
from trl.counts import counted

WIDEST, PLAIN = 120, 100
"""Width in columns: the maximum in a terminal, and the default where output is redirected."""

HEADING, NAME, TYPE, DEFAULT, CODE = "bold yellow", "cyan", "dim", "dim", "italic"

_METAVARS = {"int": "INT", "float": "NUMBER", "str": "TEXT", "dict": "JSON", "any": "VALUE"}
SHORT = 30
"""Width in columns of option names in a narrow terminal; a wide one gives them a third of its width."""

_SHORT_CHOICES = 6
"""Number of choices listed per option in the short help; --help-all lists all."""


def console() -> Console:
    if sys.stdout.isatty():
        return Console(highlight=False, width=min(Console().width, WIDEST))
    return Console(highlight=False, width=int(os.environ.get("COLUMNS", PLAIN)))


def print_options(
    usage: str,
    summary: str,
    options: Sequence[Option],
    *,
    everything: bool,
    examples: Sequence[str] = (),
) -> None:
    """Print the help screen of a command: its commonly used options, or all with `everything`."""
    out = console()
    reads_files = all(option.name != "config" for option in options)  # else `--config` is an option of its own
    shown = [option for option in options if everything or is_common(option)]
    files = " [--config FILE.yaml …]" if reads_files else ""
    print_head(out, f"{usage}{files} [--option VALUE …]", summary, examples)
    width = min(2 + max(len(option.name) for option in shown), max(out.width // 3, SHORT))
    for title, group in by_theme(shown).items():
        print_title(out, title)
        for option in group:
            _print_option(out, option, width, whole=everything)
    _print_foot(out, usage, hidden=len(options) - len(shown), reads_files=reads_files)


def print_head(out: Console, usage: str, summary: str, examples: Sequence[str] = ()) -> None:
    out.print(Text.assemble(("Usage  ", HEADING), (usage, "bold")), soft_wrap=True)
    if summary:
        out.print(Text(f"\n{summary}"))
    if examples:
        out.print()
    print_examples(out, examples)


def print_title(out: Console, title: str) -> None:
    out.print(Text(f"\n{title}", style=HEADING))


def print_examples(out: Console, examples: Sequence[str]) -> None:
    """Print commands to copy; wrap a long one with a backslash before an option."""
    for example in examples:
        lines = [""]
        for part in re.split(r" (?=--)", example):
            if lines[-1] and len(f"{lines[-1]} {part} \\") + 2 > out.width:
                lines[-1] += " \\"
                lines.append("   ")
            lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
        out.print(Text("\n".join(f"  {line}" for line in lines), style="green"), soft_wrap=True)


def print_rows(out: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a heading and a table of names and descriptions."""
    print_title(out, title)
    table = Table.grid(padding=(0, 2))
    table.add_column(style=NAME, max_width=WIDEST // 3)
    table.add_column()
    for name, text in rows:
        table.add_row(Text(name), _with_code(text))
    out.print(Padding(table, (0, 0, 0, 2)), width=min(out.width, WIDEST))


def _print_option(out: Console, option: Option, width: int, *, whole: bool) -> None:
    """Print an option in three columns (name, type, description); a name longer than `width` gets its own line."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(width=width, style=NAME, no_wrap=True)
    table.add_column(width=8, style=TYPE, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    name, kind = f"--{option.name}", _metavar(option.kind)
    if len(name) > width:
        out.print(Text.assemble((f"  {name}  ", NAME), (kind, TYPE)), soft_wrap=True)
        name = kind = ""
    table.add_row(name, kind, _description(option, whole=whole))
    out.print(Padding(table, (0, 0, 0, 2)))


FILES = (
    "Options can also be set in a YAML file (`option: value`, `env:` for environment variables): the command line overrides "
    "files, later files override earlier ones. "
)


def _print_foot(out: Console, usage: str, *, hidden: int, reads_files: bool) -> None:
    out.print()
    if hidden:
        out.print(Text.assemble((f"{usage} --help-all", "bold"), f" shows {counted(hidden, 'more option')}."))
    out.print(
        f"{FILES if reads_files else ''}Switches: --flag, --flag false, --no_flag. Lists: --option a b c. No value: --option none.",
        style="dim",
    )


def _metavar(kind: OptionType) -> str:
    if kind.item is not None:
        return f"{_metavar(kind.item)} …" if kind.item.item is None and not kind.item.choices else "LIST"
    if "bool" in kind.scalars:
        return "switch"
    return next((_METAVARS[name] for name in ("float", "int", "dict", "str", "any") if name in kind.scalars), "NAME")


def _description(option: Option, *, whole: bool) -> Text:
    own = option.owner != "TrainingArguments"
    text = _with_code((option.help if whole or own else option.summary).replace("%%", "%"))
    choices = [str(choice) for choice in option.kind.choices if not isinstance(choice, bool)]
    if not all(f'"{choice}"' in option.help for choice in choices):
        listed = choices if whole or len(choices) <= _SHORT_CHOICES else [*choices[:_SHORT_CHOICES], "…"]
        text.append(f" {{{', '.join(listed)}}}", style=NAME)
    if option.default is REQUIRED:
        text.append(" [required]", style="bold red")
    elif option.default is not COMPUTED:
        text.append(f" [{_shown(option.default)}]", style=DEFAULT)
    return text


def _with_code(text: str) -> Text:
    styled = Text(text)
    styled.highlight_regex(r"`[^`]+`", style=CODE)
    return styled


def _shown(default: object) -> str:
    if default in (None, "", [], {}):
        return "none"
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    if isinstance(default, dict | bool):
        return json.dumps(default)
    return str(default)
