"""Read what the folder of a run says about it. Other programs may have written it, and any part may be missing.

run.json                        log, options, versions, written by `ReportCallback`
checkpoint-*/trainer_state.json, trainer_state.json, log_history.jsonl        the log alone
completions/*.parquet, *.jsonl  samples: step, prompt, completion, and numbers such as rewards
pictures.jsonl, pictures/*.png  images of the same prompts from the same noise: step, number, prompt, file, reward
before_after.jsonl              the same prompts before and after training: prompt, before, after (completion, and numbers)
summary.txt                     a sentence about the result
README.md, config.json          the model card and the model's configuration

Damaged parts are left out and listed in `RunRecord.damaged`, since a report is needed most for a run that was cut off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from trl.errors import DataError

RUN_FILE = "run.json"
COMPARISONS_FILE = "before_after.jsonl"
SUMMARY_FILE = "summary.txt"
COMPARISONS = 6
"""Most prompts that are shown before and after training."""
SAMPLED_STEPS, SAMPLES_PER_STEP = 8, 4
"""Most steps whose samples are shown, and most samples of each."""
PICTURES_FILE = "pictures.jsonl"
PICTURED_STEPS, PICTURES = 8, 16
"""Most steps whose images are shown, and most images of each."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A prompt, a completion, and numbers for it (rewards, an advantage)."""

    prompt: str
    completion: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class TrainedRow:
    """A row that the model was trained on, as text."""

    prompt: str
    completions: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """An image as the bytes of a PNG file, with its reward if there was one."""

    png: bytes
    reward: float | None = None


@dataclass(frozen=True)
class PictureGrid:
    """Images of the same prompts from the same noise at several `steps`: a row for each prompt, a column for each step.

    rewards   mean reward of the images of each step; None if they have none
    """

    steps: Sequence[int]
    rewards: Sequence[float | None]
    rows: Sequence[tuple[str, Sequence[Picture | None]]]


@dataclass(frozen=True)
class RunRecord:
    """A run, as far as its folder describes it; unknown parts are empty.

    log          rows that the trainer logged, each with its `step`
    options      options of the trainer; `changed` names those that differ from their defaults
    samples      samples by step
    comparisons  completions of the same prompts before and after training
    pictures     images of the same prompts from the same noise, over time
    damaged      files that could not be read completely, and why
    summary      a sentence about the result
    rows         some of the rows that were trained on, as texts
    again        how to repeat the run, by name: "command", "config.yaml"
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
    pictures: PictureGrid | None = None
    damaged: Sequence[str] = ()
    summary: str = ""
    rows: Sequence[TrainedRow] = ()
    again: Mapping[str, str] = field(default_factory=dict)


class Reader:
    """Reads files of a run, and collects what is wrong with them, once per file."""

    def __init__(self) -> None:
        self.damaged: dict[str, str] = {}

    def note(self, file: Path, reason: object) -> None:
        self.damaged.setdefault(file.name, f"{file.name} ({reason})")

    def text(self, file: Path) -> str:
        """The text of a file, "" if it does not exist; bytes that are not UTF-8 become �."""
        try:
            content = file.read_bytes() if file.is_file() else b""
            return content.decode(encoding="utf-8")
        except UnicodeDecodeError:
            self.note(file, "not UTF-8")
            return content.decode(encoding="utf-8", errors="replace")
        except OSError as error:
            self.note(file, error.strerror)
            return ""

    def json(self, file: Path) -> Row:
        """The JSON object in a file; empty if there is none."""
        if not (text := self.text(file)):
            return {}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            self.note(file, "cut off, or not JSON")
            return {}
        if not isinstance(found, dict):
            self.note(file, f"a {type(found).__name__} instead of an object")
            return {}
        return found

    def lines(self, file: Path) -> list[Row]:
        """The rows of a JSON-lines file; lines that are not JSON objects are left out."""
        rows = []
        for line in StringIO(self.text(file)):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                self.note(file, "lines that are not JSON objects")
        return rows

    def table(self, file: Path) -> list[Row]:
        """The rows of a file with samples (`.jsonl` or `.parquet`)."""
        if file.suffix == ".jsonl":
            return self.lines(file)
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            self.note(file, str(error).splitlines()[0][:80])
            return []


def read_run(folder: Path) -> RunRecord:
    """Read everything that is known about the run in `folder`.

    Raises DataError for a folder that does not exist, or has no files of a run.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}: give the output_dir of a run.")
    reader = Reader()
    card, samples = _read_card(folder / "README.md", reader), read_samples(folder / "completions", reader)
    states = _read_states(folder, reader)
    config = reader.json(folder / "config.json")
    if not (states or samples or card or config or (folder / PICTURES_FILE).is_file()):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{str(folder)!r} is not the output_dir of a run: that has {RUN_FILE}, checkpoints, a trainer_state.json or a "
            f"log_history.jsonl. Found: {found}.{_and_damaged(reader)}"
        )
    known = {"log": max(states, key=_last_step, default={}).get("log_history", ())}
    known |= {"step": max(map(_last_step, states), default=0), "max_steps": _first(states, "max_steps", 0)}
    known |= {name: found for name in KEPT if (found := _first(states, name, card.get(name)))}
    known["rows"] = [TrainedRow(row["prompt"], row["completions"]) for row in known.get("rows", ())]
    known["summary"] = reader.text(folder / SUMMARY_FILE).strip()
    known["model"] = {**_model_of(config), **known.get("model", {})}
    comparisons, pictures = read_comparisons(folder, reader), read_pictures(folder, reader)
    damaged = tuple(reader.damaged.values())
    return RunRecord(
        name=folder.resolve().name,
        samples=samples,
        comparisons=comparisons,
        pictures=pictures,
        damaged=damaged,
        **known,
    )


def _and_damaged(reader: Reader) -> str:
    return f" Damaged: {', '.join(reader.damaged.values())}." if reader.damaged else ""


KEPT: dict[str, Any] = {
    **dict.fromkeys(("options", "model", "versions", "again"), dict),
    **dict.fromkeys(("changed", "data", "rows"), list),
    **dict.fromkeys(("method", "started"), str),
    "seconds": int | float,
}
"""The entries of run.json besides the log, with their types."""


def read_run_file(folder: Path) -> Row:
    """The content of `run.json` in the folder; empty if there is none."""
    return Reader().json(folder / RUN_FILE)


def _first(states: Sequence[Row], name: str, otherwise: Any) -> Any:
    return next((state[name] for state in states if state.get(name)), otherwise)


def _last_step(state: Row) -> int:
    return max((row["step"] for row in state.get("log_history", ())), default=0)


# ---- the log ----


def _read_states(folder: Path, reader: Reader) -> list[Row]:
    """The contents of all files with a log: run.json first, then trainer_state.json, then checkpoints from the newest on."""
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=_step_of_folder)
    files = [folder / RUN_FILE, folder / "trainer_state.json", *reversed(checkpoints)]
    states = [_validated(reader.json(file), file, reader) for file in files]
    rows = folder / "log_history.jsonl"
    states += [_validated({"log_history": reader.lines(rows)}, rows, reader)] if rows.is_file() else []
    return [state for state in states if state]


def _validated(state: Row, file: Path, reader: Reader) -> Row:
    """The state without known entries that have a wrong type."""
    kinds = {**KEPT, "max_steps": int, "log_history": list}
    kept = {}
    for name, value in state.items():
        if isinstance(value, kinds.get(name, object)):
            kept[name] = value
        elif value is not None:
            reader.note(file, f"{name} is a {type(value).__name__}")
    if "log_history" in kept:
        kept["log_history"] = [_validated_row(row) for row in kept["log_history"] if isinstance(row, dict)]
    for name in ("changed", "data"):
        kept |= {name: [*map(str, kept[name])]} if name in kept else {}
    if "rows" in kept:
        kept["rows"] = [row for row in kept["rows"] if isinstance(row, dict) and {"prompt", "completions"} <= set(row)]
    return kept


def _validated_row(row: Row) -> Row:
    """The row of a log, with its step as an integer; 0 if it has no valid one."""
    step = row.get("step")
    is_step = isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step)
    return {**row, "step": int(step) if is_step else 0}


def _step_of_folder(file: Path) -> int:
    digits = file.parent.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


# ---- the model ----


def _model_of(config: Row) -> Row:
    classes = config.get("architectures")
    named = {
        "class": classes[0] if isinstance(classes, list) and classes else None,
        "name": config.get("_name_or_path"),
        "type": config.get("model_type"),
    }
    return {name: value for name, value in named.items() if value and isinstance(value, str)}


def _read_card(file: Path, reader: Reader) -> Row:
    """Options, versions and data from a model card, if it has the form that `trl` trainers write."""
    text = reader.text(file)
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


def read_samples(folder: Path, reader: Reader | None = None) -> dict[int, list[Sample]]:
    """Samples of up to SAMPLED_STEPS steps, spread evenly over the run, including the first and the last."""
    reader = reader or Reader()
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*.jsonl")])
    by_step: dict[int, list[Row]] = {}
    for file in _spread(files, 4 * SAMPLED_STEPS):
        for row in reader.table(file):
            if "completion" in row:
                step = row.get("step")
                by_step.setdefault(step if isinstance(step, int) else _digits(file.stem), []).append(row)
    return {
        step: [_sample(row) for row in _spread(by_step[step], SAMPLES_PER_STEP)]
        for step in _spread(sorted(by_step), SAMPLED_STEPS)
    }


def read_comparisons(folder: Path, reader: Reader | None = None) -> list[tuple[Sample, Sample]]:
    """Up to COMPARISONS prompts with their completions before and after training."""
    file, reader = folder / COMPARISONS_FILE, reader or Reader()
    rows = [row for row in reader.lines(file) if _is_comparison(row)]
    return [
        tuple(_sample({"prompt": row["prompt"], **row[side]}) for side in ("before", "after"))
        for row in _spread(rows, COMPARISONS)
    ]


def _is_comparison(row: Row) -> bool:
    sides = [row.get(side) for side in ("before", "after")]
    return "prompt" in row and all(isinstance(side, dict) and "completion" in side for side in sides)


def read_pictures(folder: Path, reader: Reader) -> PictureGrid | None:
    """Up to PICTURES images at up to PICTURED_STEPS steps, including the first and the last; None if there are none."""
    rows = [row for row in reader.lines(folder / PICTURES_FILE) if _is_picture(row) and _png(folder, row)]
    if not rows:
        return None
    cells = {(row["number"], row["step"]): row for row in rows}
    steps = _spread(sorted({row["step"] for row in rows}), PICTURED_STEPS)
    numbers = _spread(sorted({row["number"] for row in rows}), PICTURES)
    prompts = {row["number"]: row["prompt"] for row in rows}
    grid = [(prompts[n], [_picture(folder, cells.get((n, step))) for step in steps]) for n in numbers]
    return PictureGrid(steps, [_mean_reward(rows, step) for step in steps], grid)


def _is_picture(row: Row) -> bool:
    known = {"step": int, "number": int, "prompt": str, "file": str}
    return all(isinstance(row.get(name), kind) for name, kind in known.items())


def _png(folder: Path, row: Row) -> Path | None:
    """The file of an image; None if it does not exist, or is outside the run's folder."""
    path = (folder / row["file"]).resolve()
    return path if path.is_file() and path.is_relative_to(folder.resolve()) else None


def _picture(folder: Path, row: Row | None) -> Picture | None:
    return None if row is None else Picture(_png(folder, row).read_bytes(), _reward_of(row))


def _reward_of(row: Row) -> float | None:
    return row["reward"] if isinstance(row.get("reward"), int | float) else None


def _mean_reward(rows: Sequence[Row], step: int) -> float | None:
    rewards = [found for row in rows if row["step"] == step and (found := _reward_of(row)) is not None]
    return sum(rewards) / len(rewards) if rewards else None


def _digits(name: str) -> int:
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else 0


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, spread evenly, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _sample(row: Row) -> Sample:
    numbers = {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    }
    return Sample(_text(row.get("prompt")), _text(row["completion"]), numbers)


def _text(value: Any) -> str:
    """A value as text; a conversation becomes the contents of its messages, with roles if there are several messages."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return str(value[0].get("content"))
    if isinstance(value, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in value)
    return "" if value is None else str(value)
