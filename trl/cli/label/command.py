"""`trl label`: people rate, compare or correct completions on a local web page.

trl label completions.jsonl --task rate --output ratings.jsonl
trl label --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl --task compare --output pairs.jsonl
"""

from __future__ import annotations

import os
import random
import threading
import webbrowser
from pathlib import Path

from trl.cli.label.arguments import LabelArguments
from trl.cli.parser import ParsedOptions
from trl.errors import ConfigError, DataError
from trl.imports import require
from trl.label.formats import Row, answers_in, export, items_of, read_rows, write_records
from trl.label.session import Session
from trl.label.settings import ServerSettings
from trl.label.tasks import check_answer


def run(arguments: LabelArguments, given: ParsedOptions) -> int:
    file = Path(given.rest[0]).expanduser() if given.rest else None
    if arguments.export_to is not None:
        return _export(arguments, file)
    require("starlette", to="trl label")
    require("uvicorn", to="trl label")
    session = Session(arguments.task, arguments.output, form=arguments.rows, raters_per_item=arguments.raters_per_item)
    try:
        _fill(session, arguments, file, given)
        return _serve(session, arguments)
    finally:
        session.close()


def _fill(session: Session, arguments: LabelArguments, file: Path | None, given: ParsedOptions) -> None:
    """Add the items to judge, and import answers from records of other tools."""
    if (file is None) == (given.values.get("model_name_or_path") is None):
        raise ConfigError(
            "Give either a file of completions (trl label FILE), or a model and prompts for it to continue "
            "(--model_name_or_path MODEL --dataset_name PROMPTS)."
        )
    if file is None:
        from trl.cli.label.sampling import sample_rows

        rows, where = sample_rows(arguments, given), "samples"
    else:
        rows, where = read_rows(file), str(file)
    items = items_of(arguments.task, rows, where)
    for number, row in enumerate(rows, start=1):
        _keep_answers(session, row, f"{where}, row {number}")
    if arguments.shuffle:
        random.Random(arguments.seed).shuffle(items)
    session.add(items[: arguments.limit])


def _keep_answers(session: Session, row: Row, where: str) -> None:
    """Import the answers that a row has from another tool. Raises DataError, with the row, for an invalid answer."""
    if not (said := answers_in(session.task, row, where)):
        return
    keys = session.add(items_of(session.task, [row], where))
    if len(keys) > 1:
        raise DataError(f"{where} has answers, but makes {len(keys)} items: a row with answers must make one item.")
    for rater, value in said:
        if rater not in session.answers.get(keys[0], {}):
            check_answer(session.task, session.items[keys[0]], value, f"{where}: ")
            session.answer(rater, keys[0], value)


def _serve(session: Session, arguments: LabelArguments) -> int:
    """Serve the page until Ctrl-C."""
    from trl.label.server import LabelServer

    settings = ServerSettings(
        arguments.port, arguments.share_on_lan, arguments.token, read_guidelines(arguments.guidelines)
    )
    progress = session.progress("")
    with LabelServer(session, settings) as server:
        print(f"{progress.total:,} items, {progress.done:,} of them done. The page is on {server.url}", flush=True)
        if server.lan_url:
            print(f"From other devices of this network: {server.lan_url}", flush=True)
        print(f"Answers are saved to {session.output}. Stop with Ctrl-C; the same command resumes.", flush=True)
        if arguments.open_browser and _has_screen():
            webbrowser.open(server.url)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\r", end="")
    print(
        f"{session.progress('').done:,} of {progress.total:,} items are done; {len(session.rows()):,} rows in {session.output}."
    )
    return 0


def _has_screen() -> bool:
    return (
        os.name == "nt"
        or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
        or os.uname().sysname == "Darwin"
    )


def read_guidelines(given: str | None) -> str:
    """The text itself, or the content of the .md or .txt file of that name."""
    if given is None:
        return ""
    path = Path(given).expanduser()
    if len(given) < 1000 and path.suffix in (".md", ".txt"):
        if not path.is_file():
            raise ConfigError(f"guidelines={given!r}: there is no such file.")
        return path.read_text(encoding="utf-8")
    return given


def _export(arguments: LabelArguments, file: Path | None) -> int:
    session = Session(arguments.task, arguments.output, raters_per_item=arguments.raters_per_item)
    try:
        if file is not None:
            session.add(items_of(arguments.task, read_rows(file), str(file)))
        records = export(session, arguments.export_format)
    finally:
        session.close()
    path = Path(arguments.export_to).expanduser()
    write_records(records, path)
    print(f"{len(records):,} records for {arguments.export_format} are in {path}.")
    return 0
