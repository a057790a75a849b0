"""Numbers as messages tell them."""

from __future__ import annotations


def counted(number: int, name: str) -> str:
    """`1 row`, `2,714 rows`."""
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    return f"{number:,} {name if number == 1 else plural}"


def percent(part: float, whole: float, digits: int = 0) -> str:
    """A share in per cent, rounded; `100%` of all and `0%` of nothing alone, else `>99%` and `<1%`."""
    share, step = part / max(1, whole), 10 ** -(digits + 2)
    if part < whole and share > 1 - step / 2:
        return f">{1 - step:.{digits}%}"
    return f"<{step:.{digits}%}" if 0 < share < step / 2 else f"{share:.{digits}%}"


def size_of(count: int) -> str:
    """Bytes as people read them: "1.50 GiB", "20.0 MiB"."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
