"""Text from outside, as a terminal may show it: nothing in it moves the cursor, sets a title or a colour, or hides a line."""

from __future__ import annotations

KEPT = "\n\t"
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in KEPT}
"""C0, as the symbols of their names: ESC is ␛."""
EIGHT_BIT = {code: f"␛{chr(code - 0x40)}" for code in range(0x80, 0xA0)}
"""C1, as the two characters that mean the same: CSI is ␛[."""
INVISIBLE = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0x200E, 0x2010), 0x061C], "�")
"""Marks that turn the direction of text, so that a line reads otherwise than it is."""

SYMBOLS = CONTROLS | {0x7F: "␡"} | EIGHT_BIT | INVISIBLE | dict.fromkeys(range(0xD800, 0xE000), "�")


def printable(text: str) -> str:
    """The text with control characters as symbols; line ends and tabs stay."""
    return text.translate(SYMBOLS)
