"""docs/stops.md names a test for each promise: they are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tests_that_the_page_names_are_there():
    page = (ROOT / "docs" / "stops.md").read_text()
    files = {*re.findall(r"`((?:tests/\w+/)?test_\w+\.py)", page)}
    paths = [ROOT / file if "/" in file else ROOT / "tests" / "stops" / file for file in files]
    source = "".join(path.read_text() for path in paths)
    names = re.findall(r"::(test_\w+)", page)
    assert len(names) > 15
    assert not [name for name in names if f"def {name}(" not in source]
