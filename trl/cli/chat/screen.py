"""The chat's input and output: colours and a spinner in a terminal; plain answers only if output is redirected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from rich.console import Console
from rich.text import Text

from trl.cli.help import print_rows
from trl.printable import printable

USER, SPEAKER, NOTE, ERROR = "bold cyan", "bold green", "dim", "bold red"


class Screen:
    """Reads messages and prints answers. Notes and errors go to standard error if standard output is redirected."""

    def __init__(self) -> None:
        self.out = Console(highlight=False)
        self.talks = self.out.is_terminal and sys.stdin.isatty()
        """True if both input and output are a terminal, so that prompts are shown."""
        self.aside = self.out if self.out.is_terminal else Console(stderr=True, highlight=False)
        self.prompt = PromptSession() if self.talks else None
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # invalid bytes and unencodable characters must not end the session
                stream.reconfigure(errors="replace")

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a spinner with `text` meanwhile."""
        if not self.talks:
            yield
            return
        with self.out.status(Text(text, style=NOTE)):
            yield

    def greet(self, name: str, details: str, notes: Sequence[str]) -> None:
        if self.talks:
            self.out.print(Text.assemble((printable(name), SPEAKER), "  ", (details, NOTE)))
            self.out.print(Text("help lists the commands · Ctrl-C stops an answer · exit leaves", style=NOTE))
        for note in notes:
            self.note(note)

    def ask(self, user: str) -> str:
        """Read the user's next message; a backslash at the end of a line continues it. Raises EOFError at the end."""
        lines = [self._line(user)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line("…"))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.prompt is not None:
            style = "" if self.out.no_color else "bold ansicyan"
            text = "… " if prompt == "…" else f"\n{prompt} › "
            return self.prompt.prompt(FormattedText([(style, text)]))
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def echo(self, user: str, text: str) -> None:
        """Show a message that was sent on behalf of the user."""
        if self.talks:
            self.out.print(Text.assemble((f"{user} › ", USER), printable(text)))

    @contextmanager
    def answer(self, name: str) -> Iterator[Callable[[str], None]]:
        """Yield a function that prints the pieces of an answer, with the speaker's name before the first."""
        label = Text(printable(f"{name} › "), style=SPEAKER) if self.talks else Text()
        spinner = self.out.status(Text("…", style=NOTE)) if self.talks else None
        begun = False

        def show(piece: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                piece = piece.lstrip()
                if spinner is not None:
                    spinner.stop()
                    self.out.print(label, end="")
            self.out.out(printable(piece), end="", highlight=False)

        if spinner is not None:
            spinner.start()
        try:
            yield show
        finally:
            if spinner is not None:
                spinner.stop()
            if begun:
                self.out.out("")

    def close_answer(self, tokens: int, seconds: float, *, interrupted: bool) -> None:
        """Print the number of tokens and tokens per second, or that the answer was interrupted."""
        if interrupted:
            self.note("Interrupted.")
        elif self.talks and tokens:
            self.note(f"{tokens:,} tokens · {tokens / seconds:,.1f} tokens/s")

    def note(self, text: str) -> None:
        self.aside.print(Text(printable(text), style=NOTE))

    def error(self, text: str) -> None:
        self.aside.print(Text(printable(text), style=ERROR))

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        print_rows(self.out, title, [(name, printable(text)) for name, text in rows])

    def clear(self) -> None:
        if self.talks:
            self.out.clear()
