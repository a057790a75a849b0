"""Format counts, percentages and sizes for messages."""

from __future__ import annotations


def counted(number: int, name: str) -> str:
    """A count with its noun, in the plural if needed: `1 row`, `2,714 rows`."""
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    return f"{number:,} {name if number == 1 else plural}"


def percent(part: float, whole: float, digits: int = 0) -> str:
    """`part / whole` as a rounded percentage; only all is `100%` and only none `0%`, near those it is `>99%` or `<1%`."""
    share, step = part / max(1, whole), 10 ** -(digits + 2)
    if part < whole and share > 1 - step / 2:
        return f">{1 - step:.{digits}%}"
    return f"<{step:.{digits}%}" if 0 < share < step / 2 else f"{share:.{digits}%}"


def size_of(count: int) -> str:
    """A number of bytes in readable units: "1.50 GiB", "20.0 MiB"."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
