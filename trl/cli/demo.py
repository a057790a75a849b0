"""`trl demo`: reinforcement learning from human feedback in three steps, on film reviews that come along."""

from __future__ import annotations

from collections.abc import Sequence

from trl.cli.fields import aliases_in_source, options_in_source
from trl.cli.parser import OptionParser
from trl.cli.train import check_model
from trl.demo.options import DemoArguments

SUMMARY = (
    "Fine-tuning, a reward model and PPO on film reviews that come along: a model learns to write positive ones. Ends "
    "with samples of before and after, and a page of curves."
)
OPTIONS = "trl.demo.options:DemoArguments"
EXAMPLES = ("trl demo", "trl demo --model_name_or_path gpt2 --reward_model_name_or_path lvwerra/distilbert-imdb")


def run(words: Sequence[str]) -> int:
    options = options_in_source(OPTIONS)
    given = OptionParser(options, aliases_in_source(OPTIONS)).parse(words)
    if given.help:
        from trl.cli.help import print_options

        print_options("trl demo", SUMMARY, options, everything=True, examples=EXAMPLES)
        return 0
    arguments = given.arguments_for(DemoArguments)
    if arguments.model_name_or_path is not None:
        check_model(arguments.model_name_or_path)
    from trl.demo.run import run_demo

    return run_demo(arguments)
