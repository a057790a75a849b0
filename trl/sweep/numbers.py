"""Numbers in YAML as people write them: `1e-5`, which YAML 1.1 takes for text as it has no point."""

from __future__ import annotations

import re
from typing import Any

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def with_numbers(value: Any) -> Any:
    """`value` with the texts in it that are numbers with an exponent as numbers."""
    if isinstance(value, dict):
        return {name: with_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [with_numbers(each) for each in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value
