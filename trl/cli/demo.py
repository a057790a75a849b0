"""`trl demo`: reinforcement learning from human feedback in three steps, on film reviews that trl includes."""

from __future__ import annotations

from trl.cli.parser import ParsedOptions
from trl.cli.train import check_model
from trl.demo.options import DemoArguments


def run(arguments: DemoArguments, _: ParsedOptions) -> int:
    if arguments.model_name_or_path is not None:
        check_model(arguments.model_name_or_path)
    from trl.demo.run import run_demo

    return run_demo(arguments)
