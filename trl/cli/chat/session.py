"""The chat session: reads commands and messages; errors are shown and do not end the session.

you › set temperature=0.2; max_new_tokens=64
you › Why is the sky blue?
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from pathlib import Path

from trl.cli.chat.arguments import Generation
from trl.cli.chat.images import check_image, content_with
from trl.cli.chat.screen import Screen
from trl.cli.chat.talk import Conversation, Speaker, TooLong
from trl.cli.fields import options_of
from trl.cli.values import Mismatch, from_words
from trl.errors import ConfigError, TrlError, unknown

COMMANDS = {
    "help": "show this list, and what `set` can change",
    "/image PATH": "attach an image to the next message",
    "example [NAME]": "send an example message; without a name, list them",
    "set KEY=VALUE; …": "change how answers are generated",
    "save [NAME]": "write the conversation to a file",
    "clear": "start a new conversation on an empty screen",
    "reset": "start a new conversation, with the initial settings",
    "exit": "leave (as does Ctrl-D)",
}
"""Commands and their descriptions. All may start with a slash; `/image` must."""

_ALONE = ("help", "clear", "reset", "exit")
_WITH_NAME = ("example", "save")


@dataclass(frozen=True)
class Command:
    name: str
    rest: str = ""


def read_command(line: str) -> Command | None:
    """Parse a line as a command; None if it is a message. "save draft" is a command, "save me from this" a message.

    Raises ConfigError for an unknown command: a single word after a slash.
    """
    word, _, rest = line.strip().partition(" ")
    name, rest = word.removeprefix("/").lower(), rest.strip()
    if word.lower() == "/image":
        return Command("image", rest)
    if name in _ALONE and not rest:
        return Command(name)
    if name in _WITH_NAME and " " not in rest:
        return Command(name, rest)
    if name == "set" and (not rest or "=" in rest):
        return Command(name, rest)
    if word.startswith("/") and name.isalpha() and not rest:
        raise ConfigError(unknown("command", word, [f"/{known}" for known in (*_ALONE, *_WITH_NAME, "set", "image")]))
    return None


def with_changes(generation: Generation, text: str) -> Generation:
    """`generation` with the changes in `key=value; key=value`. Raises ConfigError for mistakes."""
    options = {option.name: option for option in options_of(Generation)}
    changes = {}
    for part in filter(str.strip, text.split(";")):
        key, equals, word = (piece.strip() for piece in part.partition("="))
        key = key.removeprefix("--").replace("-", "_")
        if not equals:
            raise ConfigError(f"{part.strip()!r} is not a setting: write key=value.")
        if key not in options:
            raise ConfigError(unknown("setting", key, options))
        try:
            changes[key] = from_words(options[key].kind, [word])
        except Mismatch as error:
            raise ConfigError(f"{key} was given {word!r}, but takes {error}.") from None
    return replace(generation, **changes)


class Session:
    """A conversation between the user and a speaker. `run` returns when the user leaves."""

    def __init__(
        self,
        speaker: Speaker,
        generation: Generation,
        screen: Screen,
        *,
        user: str,
        examples: Mapping[str, str],
        save_folder: str,
    ) -> None:
        self.speaker, self.screen, self.user, self.examples = speaker, screen, user, examples
        self.generation = self.initial = generation
        self.folder = Path(save_folder).expanduser()
        self.conversation = Conversation()
        self.images: list[str] = []
        """Paths of the images that go with the next message."""
        self.saved: set[Path] = set()
        self.told_of_dropping = False

    def run(self) -> None:
        self.screen.greet(self.speaker.name, self.speaker.details, self.speaker.notes)
        interrupted = False
        while True:
            try:
                line = self.screen.ask(self.user)
                interrupted = False
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                self.screen.note("Ctrl-C once more, or `exit`, leaves.")
                continue
            try:
                command = read_command(line)
                if command == Command("exit"):
                    return
                if command is None:
                    self.say(line)
                else:
                    self._obey(command)
            except (TrlError, OSError, HTTPException) as error:  # show the error and continue
                self.screen.error(str(error) or type(error).__name__)

    def _obey(self, command: Command) -> None:
        takes_rest = command.name in (*_WITH_NAME, "set", "image")
        method = getattr(self, f"_do_{command.name}")
        method(command.rest) if takes_rest else method()

    # ---- talking ----

    def say(self, text: str) -> None:
        """Send `text` to the speaker and show the answer. A message without an answer is removed again."""
        if not text.strip():
            return
        self.conversation.add("user", content_with(self.images, text))
        pieces: list[str] = []
        try:
            self._answer(pieces)
        finally:
            answer = "".join(pieces).strip()
            if answer:
                self.images = []
                self.conversation.add("assistant", answer)
            else:
                self.conversation.messages.pop()

    def _answer(self, pieces: list[str]) -> None:
        """Stream an answer to the screen, until it ends or is interrupted, and collect it in `pieces`."""
        tokens, interrupted, started = 0, False, time.perf_counter()
        with self.screen.answer(self.speaker.name) as show:

            def say(piece: str) -> None:
                pieces.append(piece)
                show(piece)

            try:
                tokens = self._ask(say)
            except KeyboardInterrupt:
                interrupted = True
        self.screen.close_answer(tokens, time.perf_counter() - started, interrupted=interrupted)

    def _ask(self, say: Callable[[str], None]) -> int:
        """Ask the speaker, dropping the oldest turns until the conversation fits the context."""
        while True:
            try:
                return self.speaker.answer(self.conversation.seen(self.generation.system_prompt), self.generation, say)
            except TooLong:
                if not self.conversation.drop_oldest():
                    raise
                self._tell_of_dropping()

    def _tell_of_dropping(self) -> None:
        if not self.told_of_dropping:
            self.told_of_dropping = True
            self.screen.note("The conversation is longer than the model's context: the oldest turns are left out.")

    # ---- commands ----

    def _do_help(self) -> None:
        self.screen.table("Commands", COMMANDS.items())
        options = {option.name: option for option in options_of(Generation)}
        values = asdict(self.generation)
        self.screen.table("Settings", [(f"{k} = {_shown(v)}", options[k].help) for k, v in values.items()])

    def _do_image(self, path: str) -> None:
        if not path:
            raise ConfigError("/image takes the path of a file: /image photo.jpg")
        self.speaker.check_reads_images()
        found, size = check_image(path)
        self.images.append(found)
        self.screen.note(f"{Path(found).name}, {size}: the model sees it with your next message.")

    def _do_example(self, name: str) -> None:
        if not name:
            self.screen.table("Examples", self.examples.items())
        elif name not in self.examples:
            raise ConfigError(unknown("example", name, self.examples))
        else:
            self.screen.echo(self.user, self.examples[name])
            self.say(self.examples[name])

    def _do_set(self, text: str) -> None:
        before = asdict(self.generation)
        self.generation = with_changes(self.generation, text)
        changed = {k: v for k, v in asdict(self.generation).items() if v != before[k]}
        self.screen.note(", ".join(f"{k} = {_shown(v)}" for k, v in changed.items()) or "Nothing has changed.")

    def _do_save(self, name: str) -> None:
        name = name or time.strftime("%Y-%m-%d_%H-%M-%S")
        path = self.folder / (name if name.endswith(".json") else f"{name}.json")
        if path.exists() and path not in self.saved:
            raise ConfigError(f"{path} already holds another conversation: give another name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "model": self.speaker.name,
            "settings": asdict(self.generation),
            "messages": self.conversation.messages,
        }
        path.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        self.saved.add(path)
        self.screen.note(f"The conversation is in {path}.")

    def _do_clear(self) -> None:
        self._start_anew()
        self.screen.clear()
        self.screen.note("A new conversation.")

    def _do_reset(self) -> None:
        self._start_anew()
        self.generation = self.initial
        self.screen.note("A new conversation, with the settings of the start.")

    def _start_anew(self) -> None:
        self.conversation, self.images, self.told_of_dropping = Conversation(), [], False


def _shown(value: object) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
