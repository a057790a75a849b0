"""`trl report RUN`: a page of a run, in one file that opens in any browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trl.cli.fields import options_in_source
from trl.cli.parser import OptionParser
from trl.errors import ConfigError

SUMMARY = "A page of a run: curves, samples, configuration, versions; one file that opens in any browser."


@dataclass
class ReportArguments:
    """Options of the report."""

    output: str | None = None
    """Where the page goes. None: `report.html` in the run's folder."""


def run(words: Sequence[str]) -> int:
    options = options_in_source(f"{__name__}:ReportArguments")
    named = bool(words) and not words[0].startswith("-")
    given = OptionParser(options).parse(words[1:] if named else words)
    if given.help:
        from trl.cli.help import print_options

        examples = ["trl report opt-sft-imdb", "trl report opt-sft-imdb --output page.html"]
        print_options("trl report RUN", SUMMARY, options, everything=True, examples=examples)
        return 0
    if not named:
        raise ConfigError("trl report takes the folder of a run: trl report RUN [--output FILE].")
    from trl.report.page import write_report

    print(f"The report is in {write_report(words[0], given.arguments_for(ReportArguments).output)}.")
    return 0
