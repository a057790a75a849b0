"""What a run's folder tells about it, whoever wrote it: any part may be missing.

run.json                        log, options, versions: what `ReportCallback` keeps
checkpoint-*/trainer_state.json, trainer_state.json, log_history.jsonl        the log alone
completions/*.parquet, *.jsonl  samples: step, prompt, completion, and numbers such as rewards
before_after.jsonl              the same prompts before and after: prompt, before, after (completion, and numbers)
README.md, config.json          the model card and the model's configuration
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl.errors import DataError

RUN_FILE = "run.json"
COMPARISONS_FILE = "before_after.jsonl"
COMPARISONS = 6
"""So many prompts are shown before and after."""
SAMPLED_STEPS, SAMPLES_PER_STEP = 8, 4
"""Samples of so many steps are shown, and so many of each."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A prompt, what the model made of it, and numbers about that (rewards, an advantage)."""

    prompt: str
    completion: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """A run as far as its folder tells: what is not known is empty.

    log          rows as the trainer logged them, each with its `step`
    options      of the trainer; `changed` names those that differ from their defaults
    samples      by step
    comparisons  the same prompts before and after
    """

    name: str
    log: Sequence[Row] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    changed: Sequence[str] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Sequence[str] = ()
    method: str = ""
    step: int = 0
    max_steps: int = 0
    started: str = ""
    seconds: float = 0.0
    samples: Mapping[int, Sequence[Sample]] = field(default_factory=dict)
    comparisons: Sequence[tuple[Sample, Sample]] = ()


def read_run(folder: Path) -> RunRecord:
    """Everything that is known of the run in `folder`.

    Raises DataError for a folder that is not there, or holds nothing of a run.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}: give the output_dir of a run.")
    card, samples = _read_card(folder / "README.md"), read_samples(folder / "completions")
    states = _read_states(folder)
    config = _read_json(folder / "config.json")
    if not (states or samples or card or config):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{str(folder)!r} holds no run: a run's output_dir has {RUN_FILE}, checkpoints, a trainer_state.json or a "
            f"log_history.jsonl. Found: {found}."
        )
    known = {"log": max(states, key=_last_step, default={}).get("log_history", ())}
    known |= {"step": max(map(_last_step, states), default=0), "max_steps": _first(states, "max_steps", 0)}
    known |= {name: _first(states, name, card.get(name, empty)) for name, empty in _KEPT.items()}
    known["model"] = {**_model_of(config), **known["model"]}
    return RunRecord(name=folder.resolve().name, samples=samples, comparisons=read_comparisons(folder), **known)


_KEPT: dict[str, Any] = {
    "options": {},
    "changed": (),
    "model": {},
    "versions": {},
    "data": (),
    "method": "",
    "started": "",
    "seconds": 0.0,
}
"""What run.json holds beside the log, and what stands for it where it is not known."""


def _first(states: Sequence[Row], name: str, otherwise: Any) -> Any:
    return next((state[name] for state in states if state.get(name)), otherwise)


def _last_step(state: Row) -> int:
    return max((row.get("step", 0) for row in state.get("log_history", ())), default=0)


# ---- the log ----


def _read_states(folder: Path) -> list[Row]:
    """Whatever holds a log: the run's own file first, then the newest checkpoint."""
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_step_of_folder)
    files = [folder / RUN_FILE, folder / "trainer_state.json", *reversed(checkpoints)]
    states = [state for state in map(_read_json, files) if state]
    rows = folder / "log_history.jsonl"
    return [*states, {"log_history": _read_lines(rows)}] if rows.is_file() else states


def _step_of_folder(file: Path) -> int:
    digits = file.parent.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _read_json(file: Path) -> Row:
    """What the file holds; nothing where it is not there, or was cut off while it was written."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _read_lines(file: Path) -> list[Row]:
    """Rows of a JSON-lines file. A last line that was cut off is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


# ---- the model ----


def _model_of(config: Row) -> Row:
    named = {
        "class": (config.get("architectures") or [None])[0],
        "name": config.get("_name_or_path"),
        "type": config.get("model_type"),
    }
    return {name: value for name, value in named.items() if value}


def _read_card(file: Path) -> Row:
    """Options, versions and data of a model card, where it has them in the form that our trainers write."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    options = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", sections.get("Options", ""), re.MULTILINE))
    method = re.search(r"trained with (\S+) by", text)
    found = {
        "options": options,
        "changed": tuple(options),
        "versions": dict(re.findall(r"^- (\S+) (\S+)$", sections.get("Versions", ""), re.MULTILINE)),
        "data": tuple(re.findall(r"^- (.+)$", sections.get("Data", ""), re.MULTILINE)),
        "method": method.group(1) if method else "",
    }
    return {name: value for name, value in found.items() if value}


# ---- samples ----


def read_samples(folder: Path) -> dict[int, list[Sample]]:
    """Samples of up to SAMPLED_STEPS steps, spread over the run with its first and last among them."""
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*.jsonl")])
    by_step: dict[int, list[Row]] = {}
    for file in _spread(files, 4 * SAMPLED_STEPS):
        for row in _read_table(file):
            if "completion" in row:
                by_step.setdefault(int(row.get("step") or _digits(file.stem)), []).append(row)
    return {
        step: [_sample(row) for row in _spread(by_step[step], SAMPLES_PER_STEP)]
        for step in _spread(sorted(by_step), SAMPLED_STEPS)
    }


def read_comparisons(folder: Path) -> list[tuple[Sample, Sample]]:
    """Up to COMPARISONS prompts with what became of them before and after."""
    file = folder / COMPARISONS_FILE
    rows = _spread(_read_lines(file), COMPARISONS) if file.is_file() else []
    return [tuple(_sample({"prompt": row["prompt"], **row[side]}) for side in ("before", "after")) for row in rows]


def _read_table(file: Path) -> list[Row]:
    if file.suffix == ".jsonl":
        return _read_lines(file)
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file).to_pylist()


def _digits(name: str) -> int:
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else 0


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _sample(row: Row) -> Sample:
    numbers = {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Sample(_text(row.get("prompt")), _text(row["completion"]), numbers)


def _text(value: Any) -> str:
    """A text, or the messages of a conversation one after the other, with their roles if they are several."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return str(value[0]["content"])
    if isinstance(value, list):
        return "\n".join(f"{m['role']}: {m['content']}" if isinstance(m, dict) else str(m) for m in value)
    return "" if value is None else str(value)
