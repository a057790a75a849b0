"""What other libraries report of what they do among themselves, and nobody who trains needs to read.

Each is known by its words, so that anything else that they say is heard.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGED = {
    "DeepSpeed": "Setting accelerator to CPU",
    "datasets.packaged_modules.json.json": "Failed to load JSON",  # the error says so, too
    "transformers.trainer_utils": "new PAD/BOS/EOS tokens",  # that is what they are set for
    # A reward model has a head that no language model had. Weights that are missing beside it are no noise.
    "transformers.modeling_utils": r"ForSequenceClassification.* LOAD REPORT(?!(?s:.)*\n(?!score\.)\S+ +\| MISSING)|"
    r"The new (embeddings|lm_head weights) will be initialized",  # as a chat template asks for
}
"""Loggers, and what in their messages is noise."""

WARNED = (
    "Setting `save_embedding_layers` to `True`",  # so that a vocabulary that grew is saved with its adapter
    "`is_gradient_checkpointing` is deprecated",  # peft reads a property that transformers renamed
)
"""Beginnings of warnings."""


class _Words(logging.Filter):
    def __init__(self, noise: str) -> None:
        super().__init__()
        self.noise = re.compile(noise)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.noise.search(record.getMessage())


def silence() -> None:
    """Leave the noise out for as long as the process lives. Does nothing the second time."""
    for name, noise in LOGGED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Words) for each in logger.filters):
            logger.addFilter(_Words(noise))
    for message in WARNED:
        warnings.filterwarnings("ignore", message=re.escape(message))


@contextmanager
def without_noise(*loggers: str) -> Iterator[None]:
    """Leave out the noise of these loggers meanwhile, of all of them if none is named."""
    filters = {logging.getLogger(name): _Words(LOGGED[name]) for name in loggers or LOGGED}
    for logger, words in filters.items():
        logger.addFilter(words)
    try:
        yield
    finally:
        for logger, words in filters.items():
            logger.removeFilter(words)


class _Held(logging.Filter):
    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        is_held = self.words in record.getMessage()
        self.records += [record] * is_held
        return not is_held


@contextmanager
def unless_said(name: str, words: str, error: type[Exception]) -> Iterator[None]:
    """Hold back what the logger `name` says with these words until the block ends; an `error` says it in its place."""
    logger, held = logging.getLogger(name), _Held(words)
    logger.addFilter(held)
    try:
        yield
    except error:
        held.records.clear()
        raise
    finally:
        logger.removeFilter(held)
        for record in held.records:
            logger.handle(record)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out the warnings that are noise meanwhile."""
    with warnings.catch_warnings():
        for message in WARNED:
            warnings.filterwarnings("ignore", message=re.escape(message))
        yield
