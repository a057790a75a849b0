"""`trl chat`: talk to a model in the terminal.

trl chat --model_name_or_path Qwen/Qwen1.5-0.5B-Chat
trl chat --server http://localhost:8000
"""

from __future__ import annotations

import getpass
from collections.abc import Mapping

from trl.cli.chat.arguments import EXAMPLES, ChatArguments, generation_of
from trl.cli.chat.screen import Screen
from trl.cli.chat.session import Session
from trl.cli.chat.talk import Speaker
from trl.cli.parser import ParsedOptions, read_yaml
from trl.cli.train import model_to_load
from trl.errors import ConfigError


def run(arguments: ChatArguments, given: ParsedOptions) -> int:
    examples = read_examples(arguments.examples_path)
    screen = Screen()
    session = Session(
        make_speaker(arguments, given, screen),
        generation_of(arguments),
        screen,
        user=arguments.user or getpass.getuser(),
        examples=examples,
        save_folder=arguments.save_folder,
    )
    session.run()
    return 0


def make_speaker(arguments: ChatArguments, given: ParsedOptions, screen: Screen) -> Speaker:
    """Connect to the server's model, or load a model in this process."""
    if arguments.server is not None:
        from trl.cli.chat.server import connect

        return connect(arguments, given.values.get("model_name_or_path"))
    model = model_to_load(given)
    with screen.waiting(f"Loading {model.model_name_or_path} …"):
        from transformers import logging

        from trl.cli.chat.local import load_speaker

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return load_speaker(arguments, model)


def read_examples(path: str | None) -> Mapping[str, str]:
    """Example messages by name: the built-in ones, and those of a YAML file, `name: text` or `name: {text: …}`.

    Raises ConfigError for a file that does not exist or has another form.
    """
    if path is None:
        return EXAMPLES
    found = read_yaml(path, "--examples_path")
    if not isinstance(found, dict):
        raise ConfigError(f"--examples_path {path}: it takes `name: text` lines, not a {type(found).__name__}.")
    texts = {str(name): value.get("text") if isinstance(value, dict) else value for name, value in found.items()}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise ConfigError(f"--examples_path {path}: {wrong[0]!r} is not a text.")
    return {**EXAMPLES, **texts}
