"""Lines broken between words while they are being written, and the letters that a terminal may be given."""

from __future__ import annotations

from rich.cells import cell_len

_UNPRINTABLE = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters that a model might write: a terminal would obey them."""

TAB = 8
_JOINING = {**{chr(code): 2 for code in range(0x1F3FB, 0x1F400)}, "\N{VARIATION SELECTOR-16}": 1}
"""Letters that join the one before in some terminals and not in others, with the columns that they may take."""

_BACK, _ERASE = "\x1b[{}D", "\x1b[K"
"""What moves a terminal's cursor back by so many columns, and erases from there to the end of the line."""


def printable(text: str) -> str:
    return text.translate(_UNPRINTABLE)


class Wrapper:
    """Gives text back, letter by letter, as a terminal with `width` columns is to be given it.

    A word that turns out not to fit its line is taken back and begun again on the next. Wide letters, whose scripts have
    no spaces, break anywhere. `column` is where the cursor stands.
    """

    def __init__(self, width: int, column: int) -> None:
        self.width, self.column = width, column
        self.word = ""

    def put(self, text: str) -> str:
        return "".join(map(self._letter, text))

    def _letter(self, letter: str) -> str:
        cells = _JOINING.get(letter, cell_len(letter))
        if letter == "\n":
            self.word, self.column = "", 0
            return letter
        if letter.isspace():
            return self._space(letter)
        if cells > 1 or letter in _JOINING:
            return self._wide(letter, cells)
        self.word += letter
        self.column += cells
        whole = cell_len(self.word)
        if self.column <= self.width or self.column == whole:
            return letter
        self.column = whole
        back = _BACK.format(whole - cells) + _ERASE if whole > cells else ""
        return f"{back}\n{self.word}"

    def _space(self, letter: str) -> str:
        """Blank space, but none at the end of a full line."""
        self.word = ""
        if self.column >= self.width:
            return ""
        self.column += TAB - self.column % TAB if letter == "\t" else 1
        return letter

    def _wide(self, letter: str, cells: int) -> str:
        self.word = ""
        if self.column + cells > self.width and letter not in _JOINING:
            self.column = cells
            return f"\n{letter}"
        self.column += cells
        return letter
