"""`trl chat`: talk to a model in the terminal.

trl chat --model_name_or_path Qwen/Qwen1.5-0.5B-Chat
trl chat --server http://localhost:8000
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trl.cli.chat.arguments import EXAMPLES, ChatArguments, generation_of
from trl.cli.commands import MODEL
from trl.cli.fields import Option, aliases_in_source, merge_options, options_in_source
from trl.cli.parser import OptionParser, ParsedOptions, read_yaml
from trl.errors import ConfigError

if TYPE_CHECKING:
    from trl.cli.chat.screen import Screen
    from trl.cli.chat.talk import Speaker

CHAT = "trl.cli.chat.arguments:ChatArguments"
TRAINED = ("use_peft", "lora_", "use_rslora", "use_dora")
"""Beginnings of the model's options that only training reads."""

DEFAULTS = {"dtype": "auto"}
"""Where this command differs from training: weights are read as they were saved."""

ALIASES = {"adapter": "adapter_name_or_path", "eos_tokens": "stop"}
SUMMARY = "Talk to a model in the terminal."
WORDS = (
    "--model_name_or_path Qwen/Qwen1.5-0.5B-Chat",
    '--model_name_or_path opt-sft-imdb --system_prompt "Be brief." --temperature 0.7',
    "--server http://localhost:8000",
)


def options() -> list[Option]:
    found = merge_options(options_in_source(MODEL), options_in_source(CHAT))
    kept = [option for option in found if not option.name.startswith(TRAINED)]
    return [replace(option, default=DEFAULTS.get(option.name, option.default)) for option in kept]


def run(words: Sequence[str]) -> int:
    given = OptionParser(options(), {**aliases_in_source(MODEL), **ALIASES}).parse(words)
    if given.help:
        return _print_help(everything=given.help == "all")
    os.environ.update(given.environment)
    arguments = given.arguments_for(ChatArguments)
    examples = read_examples(arguments.examples_path)
    from trl.cli.chat.screen import Screen
    from trl.cli.chat.session import Session

    screen = Screen()
    session = Session(
        make_speaker(given, arguments, screen),
        generation_of(arguments),
        screen,
        user=arguments.user or getpass.getuser(),
        examples=examples,
        save_folder=arguments.save_folder,
    )
    session.run()
    return 0


def _print_help(*, everything: bool) -> int:
    from trl.cli.help import print_options

    examples = [f"trl chat {each}" for each in WORDS]
    print_options("trl chat", SUMMARY, options(), everything=everything, examples=examples)
    return 0


def make_speaker(given: ParsedOptions, arguments: ChatArguments, screen: Screen) -> Speaker:
    """The server's model, or the one that is loaded here."""
    name = given.values.get("model_name_or_path")
    if arguments.server is not None:
        from trl.cli.chat.server import connect

        return connect(arguments, name)
    from trl.cli.train import check_model, check_weights
    from trl.models.config import ModelConfig

    check_weights(name := check_model(name))
    model = replace(given, values={**DEFAULTS, **given.values, "model_name_or_path": name}).arguments_for(ModelConfig)
    with screen.waiting(f"Loading {model.model_name_or_path} …"):
        from transformers import logging

        from trl.cli.chat.local import load_speaker

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return load_speaker(arguments, model)


def read_examples(path: str | None) -> Mapping[str, str]:
    """Messages by name: those that come along, and those of a YAML file, `name: text` or `name: {text: …}`.

    Raises ConfigError for a file that is not there, or holds something else.
    """
    if path is None:
        return EXAMPLES
    found = read_yaml(path, "--examples_path")
    if not isinstance(found, dict):
        raise ConfigError(f"--examples_path {path}: it takes `name: text` lines, and not a {type(found).__name__}.")
    texts = {str(name): value.get("text") if isinstance(value, dict) else value for name, value in found.items()}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise ConfigError(f"--examples_path {path}: {wrong[0]!r} is not a text.")
    return {**EXAMPLES, **texts}
