"""`trl report RUN`: a page of a run, or of several side by side, in one file that opens in any browser."""

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
    """Options of the report."""

    output: str | None = None
    """Where the page goes. None: `report.html` in the run's folder; `comparison.html` here for several runs."""

    watch: bool = False
    """Write the page again and again while the run goes on, until Ctrl-C; a browser that shows it follows."""

    every: int = 5
    """Seconds between two pages, with `watch`."""

    def __post_init__(self) -> None:
        check_bounds(self)


def run(arguments: ReportArguments, given: ParsedOptions) -> int:
    folders = given.rest
    if not folders:
        raise ConfigError(
            "trl report takes the folder of a run, or of several: trl report RUN [RUN …] [--output FILE]."
        )
    bare = [folder for folder in folders if _is_bare(folder)]
    said = [f"{folder} holds no log and no samples of a run: give the output_dir of one." for folder in bare]
    if len(bare) == len(folders) and not arguments.watch:
        raise ConfigError(" ".join(said))
    print(f"The report is in {write(folders, arguments)}.", flush=True)
    for sentence in said:
        print(sentence, file=sys.stderr)
    if arguments.watch:
        _watch(folders, arguments)
    return 0


def write(folders: Sequence[str], arguments: ReportArguments) -> Path:
    """Write the page of a run, or of the comparison of several."""
    refresh = arguments.every if arguments.watch else 0
    if len(folders) == 1:
        return write_report(folders[0], arguments.output, refresh=refresh)
    return write_comparison(folders, arguments.output or "comparison.html", refresh=refresh)


def _is_bare(folder: str) -> bool:
    run = read_run(Path(folder).expanduser())
    return not (run.log or run.samples or run.pictures)


def _watch(folders: Sequence[str], arguments: ReportArguments) -> None:
    """Write again until Ctrl-C, and then once more without a page that asks for itself."""
    try:
        while True:
            time.sleep(arguments.every)
            write(folders, arguments)
    except KeyboardInterrupt:
        write(folders, replace(arguments, watch=False))
