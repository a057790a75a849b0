"""`trl report RUN`: a page of a run, or of several side by side, in one file that opens in any browser."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from trl.cli.fields import options_in_source
from trl.cli.parser import OptionParser
from trl.errors import ConfigError

SUMMARY = "A page of a run: curves, samples, configuration, versions; one file that opens in any browser."


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
        if self.every < 1:
            raise ConfigError(f"every={self.every}: give at least 1 second.")


def run(words: Sequence[str]) -> int:
    options = options_in_source(f"{__name__}:ReportArguments")
    folders = list(takewhile(lambda word: not word.startswith("-"), words))
    given = OptionParser(options).parse(words[len(folders) :])
    if given.help:
        from trl.cli.help import print_options

        examples = [
            "trl report opt-sft-imdb",
            "trl report opt-sft-imdb --watch",
            "trl report beta-0.1 beta-0.5 --output betas.html",
        ]
        print_options("trl report RUN [RUN …]", SUMMARY, options, everything=True, examples=examples)
        return 0
    if not folders:
        raise ConfigError(
            "trl report takes the folder of a run, or of several: trl report RUN [RUN …] [--output FILE]."
        )
    arguments = given.arguments_for(ReportArguments)
    print(f"The report is in {write(folders, arguments)}.", flush=True)
    for folder in filter(_is_bare, folders):
        print(f"{folder} holds no log and no samples of a run: give the output_dir of one.", file=sys.stderr)
    if arguments.watch:
        _watch(folders, arguments)
    return 0


def write(folders: Sequence[str], arguments: ReportArguments) -> Path:
    """Write the page of a run, or of the comparison of several."""
    from trl.report.page import write_comparison, write_report

    refresh = arguments.every if arguments.watch else 0
    if len(folders) == 1:
        return write_report(folders[0], arguments.output, refresh=refresh)
    return write_comparison(folders, arguments.output or "comparison.html", refresh=refresh)


def _is_bare(folder: str) -> bool:
    from trl.report.record import read_run

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
