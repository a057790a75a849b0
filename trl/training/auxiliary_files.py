"""Auxiliary files of a run (report, model card, log): an error in writing one is a warning and does not end the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def not_fatal(what: str) -> Iterator[None]:
    """Turn any error within the context into a warning that `what` could not be written, with the reason."""
    try:
        yield
    except Exception as error:  # no auxiliary file is worth losing the run
        logger.warning(f"{what} could not be written: {type(error).__name__}: {error}. The run continues.")
