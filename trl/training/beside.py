"""Files that are written beside a run (a page, a card, a log): an error in one of them is a warning, and no end of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def not_fatal(what: str) -> Iterator[None]:
    """Turn any error of the block into a warning that `what` could not be written, and why."""
    try:
        yield
    except Exception as error:  # whatever fails here is worth less than the run
        logger.warning(f"{what} could not be written: {type(error).__name__}: {error}. The run goes on.")
