"""Make untrusted text safe for a terminal: no escape sequence in it can move the cursor, set title or colour, or hide text."""

from __future__ import annotations

KEPT = "\n\t"
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in KEPT}
"""C0 control characters, replaced by their Unicode symbols: ESC becomes ␛."""
EIGHT_BIT = {code: f"␛{chr(code - 0x40)}" for code in range(0x80, 0xA0)}
"""C1 control characters, replaced by the equivalent two-character sequence: CSI becomes ␛[."""
INVISIBLE = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0x200E, 0x2010), 0x061C], "�")
"""Bidirectional control characters, which make a line look different from its content."""

SYMBOLS = CONTROLS | {0x7F: "␡"} | EIGHT_BIT | INVISIBLE | dict.fromkeys(range(0xD800, 0xE000), "�")


def printable(text: str) -> str:
    """Replace control characters by visible symbols; line ends and tabs are kept."""
    return text.translate(SYMBOLS)
