"""Tables of options, made from the source: each option is in the table of the class that declares it.

Options in sentences (`--packing`) stay on one line.
"""

from __future__ import annotations

import re
from typing import Any

from trl.cli.commands import MODEL, SCRIPT, methods
from trl.cli.fields import REQUIRED, Option, options_in_source
from trl.cli.source import COMPUTED

_ALL = "[[options of every command]]"
_OPTION = re.compile(r"--\w[\w-]*")
_CODE = re.compile(r"(?<!<pre>)(?<!</span>)<code>[^<\n]*--[^<\n]*</code>")
SHARED = (
    "trl.trainers.config:TrainerConfig",
    "trl.trainers.config:ReferenceConfig",
    "trl.trainers.rollout_options:RolloutOptions",
    "trl.trainers.sampler_options:SamplerOptions",
    "trl.trainers.online_config:OnlineConfig",
    "trl.trainers.eval_samples:EvalSamplesOptions",
    "trl.trainers.preference:PreferenceConfig",
    "trl.trainers.diffusion.config:DiffusionConfig",
    "trl.trainers.diffusion.config:DiffusionRolloutConfig",
)
"""Bases of several configurations, each of which has a table of its own."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    if _ALL not in markdown:
        return markdown
    homes = {"TrainingArguments": ""}
    return markdown.replace(_ALL, "\n\n".join(_section(reference, homes) for reference in _classes()))


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for every page once it is HTML."""
    return _CODE.sub(lambda code: _OPTION.sub(lambda name: f'<span class="option">{name[0]}</span>', code[0]), html)


def _classes() -> list[str]:
    """References of all configurations that commands take, each once."""
    found = [
        SCRIPT,
        MODEL,
        *SHARED,
        *(reference for method in methods().values() for reference in (method.config, method.extra)),
    ]
    return list(dict.fromkeys(filter(None, found)))


def _section(reference: str, homes: dict[str, str]) -> str:
    """The options of a class that no earlier section has. `homes` maps declaring classes to their section, and is updated."""
    title, options = reference.rpartition(":")[2], options_in_source(reference)
    owners = {option.owner for option in options}
    earlier = dict.fromkeys(home for owner, home in homes.items() if home and owner in owners)
    rows = [_row(option) for option in options if option.owner not in homes]
    homes |= {option.owner: title for option in options if option.owner not in homes}
    links = ", ".join(f"[{each}](#{each.lower()})" for each in earlier)
    lead = f"The options of {links}{', and these:' if rows else '.'}\n\n" if links else ""
    head = ["| option | takes | default | what it does |", "|---|---|---|---|"] if rows else []
    return f"## {title}\n\n{lead}" + "\n".join([*head, *rows])


def _row(option: Option) -> str:
    cells = (f"`{option.name}`", str(option.kind), _default(option.default), option.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    return "" if value is COMPUTED else f"`{value!r}`"
