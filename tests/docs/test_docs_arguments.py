"""Arguments in docstrings become tables on the API page."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("griffe")
FILE = Path(__file__).parents[2] / "docs" / "arguments.py"


@pytest.fixture(scope="module")
def with_tables():
    spec = importlib.util.spec_from_file_location("arguments", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.with_tables


def test_aligned_lines_are_a_table(with_tables):
    text = "Sample.\n\nfirst, second   `a | b` of\n                that\nlast   the end\n\nRaises nothing."
    table = "| | |\n|---|---|\n| `first`, `second` | `a \\| b` of that |\n| `last` | the end |"
    assert with_tables(text) == f"Sample.\n\n{table}\n\nRaises nothing."


def test_sentences_stay(with_tables):
    text = "Two words.\nAnother line.\n\nmodel is what it is."
    assert with_tables(text) == text
