"""What other libraries report of what they do among themselves, and nobody who trains needs to read.

Each is known by its words, so that anything else that they say is heard.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
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


OWN = ("trl.rewards", "trl.rollouts")
"""Loggers of what a process says of its own samples."""


def say_once() -> None:
    """Of the processes of a node let the first say what all would: warnings about options, rows and models.

    Errors, and what is about a process's own samples, are heard from all; so is a logger whose level was set.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    for name, level in {"trl": logging.ERROR, **dict.fromkeys(OWN, logging.WARNING)}.items():
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(level)


def _without(noise: str) -> Callable[[logging.LogRecord], bool]:
    """A filter of loggers."""
    return lambda record: not re.search(noise, record.getMessage())


FILTERS = {name: _without(noise) for name, noise in LOGGED.items()}


def silence() -> None:
    """Leave the noise out for as long as the process lives. Does nothing the second time."""
    for name, words in FILTERS.items():
        logging.getLogger(name).addFilter(words)
    _ignore_warnings()


def _ignore_warnings() -> None:
    for message in WARNED:
        warnings.filterwarnings("ignore", message=re.escape(message))


@contextmanager
def without_noise(*loggers: str) -> Iterator[None]:
    """Leave out the noise of these loggers meanwhile, of all of them if none is named."""
    filters = {logging.getLogger(name): _without(LOGGED[name]) for name in loggers or LOGGED}
    for logger, words in filters.items():
        logger.addFilter(words)
    try:
        yield
    finally:
        for logger, words in filters.items():
            logger.removeFilter(words)


@contextmanager
def unless_said(name: str, words: str, error: type[Exception]) -> Iterator[None]:
    """Hold back what the logger `name` says with these words until the block ends; an `error` says it in its place."""
    held: list[logging.LogRecord] = []

    def is_told(record: logging.LogRecord) -> bool:
        is_held = words in record.getMessage()
        held.extend([record] * is_held)
        return not is_held

    logger = logging.getLogger(name)
    logger.addFilter(is_told)
    try:
        yield
    except error:
        held.clear()
        raise
    finally:
        logger.removeFilter(is_told)
        for record in held:
            logger.handle(record)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out the warnings that are noise meanwhile."""
    with warnings.catch_warnings():
        _ignore_warnings()
        yield
