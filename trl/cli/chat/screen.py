"""What the user sees: colour and a spinner in a terminal; only the answers where output is redirected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trl.cli.chat.wrap import Wrapper, printable

WIDEST, UNBROKEN = 120, 10**9
"""Columns of tables, at most; and of an answer that is not shown in a terminal."""

USER, SPEAKER, NOTE, ERROR, HEADING, NAME = "bold cyan", "bold green", "dim", "bold red", "bold yellow", "cyan"


class Screen:
    """The terminal, or plain text. Notes and errors go to standard error where standard output is redirected."""

    def __init__(self) -> None:
        self.out = Console(highlight=False)
        self.talks = self.out.is_terminal and sys.stdin.isatty()
        """Whether a person types and reads: then there are prompts."""
        self.has_cursor = self.talks and not self.out.is_dumb_terminal
        self.aside = self.out if self.out.is_terminal else Console(stderr=True, highlight=False)
        if self.talks:
            _edit_lines()

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner with `text` while something is done."""
        if not self.talks:
            yield
            return
        with self.out.status(Text(text, style=NOTE)):
            yield

    def greet(self, name: str, details: str, notes: Sequence[str]) -> None:
        if self.talks:
            self.out.print(Text.assemble((name, SPEAKER), "  ", (details, NOTE)))
            self.out.print(Text("help lists the commands · Ctrl-C stops an answer · exit leaves", style=NOTE))
        for note in notes:
            self.note(note)

    def ask(self, user: str) -> str:
        """The next line that the user types; lines that end in a backslash go on. Raises EOFError at the end."""
        lines = [self._line(user)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line("…"))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.talks:
            try:
                return input("… " if prompt == "…" else f"\n{self._coloured(f'{prompt} ›')} ")
            except (EOFError, KeyboardInterrupt):
                self.out.print()  # what follows starts a line
                raise
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _coloured(self, prompt: str) -> str:
        """The prompt in colour, where there is any; \\x01 and \\x02 tell readline what takes no room."""
        return (
            prompt if self.out.no_color or not self.out.color_system else f"\x01\x1b[1;36m\x02{prompt}\x01\x1b[0m\x02"
        )

    def echo(self, user: str, text: str) -> None:
        """Show what was said in the user's name."""
        if self.talks:
            self.out.print(Text.assemble((f"{user} › ", USER), text))

    @contextmanager
    def answer(self, name: str) -> Iterator[Callable[[str], None]]:
        """Gives a function that shows the pieces of an answer, the speaker's name before the first."""
        label = Text(f"{name} › ", style=SPEAKER) if self.talks else Text()
        spinner = self.out.status(Text("…", style=NOTE)) if self.talks else None
        # One column is left free: a cursor behind the last one cannot be moved back reliably.
        wrapper = Wrapper(self.out.width - 1 if self.has_cursor else UNBROKEN, label.cell_len)
        begun = False

        def show(piece: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                piece = piece.lstrip()
                if spinner is not None:
                    spinner.stop()
                    self.out.print(label, end="")
            self._write(wrapper.put(printable(piece)))

        if spinner is not None:
            spinner.start()
        try:
            yield show
        finally:
            if spinner is not None:
                spinner.stop()
            if begun:
                self._write("\n")

    def _write(self, text: str) -> None:
        self.out.file.write(text)
        self.out.file.flush()

    def close_answer(self, tokens: int, seconds: float, *, interrupted: bool) -> None:
        """How long it was and how fast, or that it was interrupted."""
        if interrupted:
            self.note("Interrupted.")
        elif self.talks and tokens:
            self.note(f"{tokens:,} tokens · {tokens / seconds:,.1f} tokens/s")

    def note(self, text: str) -> None:
        self.aside.print(Text(text, style=NOTE))

    def error(self, text: str) -> None:
        self.aside.print(Text(text, style=ERROR))

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style=NAME, max_width=WIDEST // 3)
        table.add_column()
        for name, text in rows:
            table.add_row(Text(name), Text(text))
        self.out.print(Text(f"\n{title}", style=HEADING))
        self.out.print(Padding(table, (0, 0, 0, 2)), width=min(self.out.width, WIDEST))

    def clear(self) -> None:
        if self.talks:
            self.out.clear()


def _edit_lines() -> None:
    """Arrow keys and history at the prompt, where the system has them."""
    with suppress(ImportError):  # Windows edits lines by itself
        import readline  # noqa: F401
