"""`trl report RUN`: write an HTML page about a run, or about several side by side, as a single file for any browser."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trl.cli.parser import ParsedOptions
from trl.errors import ConfigError
from trl.option_bounds import check_bounds
from trl.report.page import write_comparison, write_report
from trl.report.record import read_run


@dataclass
class ReportArguments:
    """Options of `trl report`."""

    output: str | None = None
    """File to write. None: `report.html` in the run's folder, or `comparison.html` in the current folder for several
    runs."""

    watch: bool = False
    """Rewrite the page every few seconds until Ctrl-C; an open browser tab refreshes itself."""

    every: int = 5
    """Seconds between updates with `watch`."""

    def __post_init__(self) -> None:
        check_bounds(self)


def run(arguments: ReportArguments, given: ParsedOptions) -> int:
    folders = given.rest
    if not folders:
        raise ConfigError("trl report takes the folders of one or more runs: trl report RUN [RUN …] [--output FILE].")
    bare = [folder for folder in folders if _is_bare(folder)]
    said = [f"{folder} holds neither a log nor samples of a run: give the output_dir of a run." for folder in bare]
    if len(bare) == len(folders) and not arguments.watch:
        raise ConfigError(" ".join(said))
    print(f"The report is in {write(folders, arguments)}.", flush=True)
    for sentence in said:
        print(sentence, file=sys.stderr)
    if arguments.watch:
        _watch(folders, arguments)
    return 0


def write(folders: Sequence[str], arguments: ReportArguments) -> Path:
    """Write the page of a run, or a comparison of several."""
    refresh = arguments.every if arguments.watch else 0
    if len(folders) == 1:
        return write_report(folders[0], arguments.output, refresh=refresh)
    return write_comparison(folders, arguments.output or "comparison.html", refresh=refresh)


def _is_bare(folder: str) -> bool:
    run = read_run(Path(folder).expanduser())
    return not (run.log or run.samples or run.pictures)


def _watch(folders: Sequence[str], arguments: ReportArguments) -> None:
    """Rewrite the page until Ctrl-C, and then once more without its self-refresh."""
    try:
        while True:
            time.sleep(arguments.every)
            write(folders, arguments)
    except KeyboardInterrupt:
        write(folders, replace(arguments, watch=False))
