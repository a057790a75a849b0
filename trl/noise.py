"""Filters for log messages and warnings of other libraries that are expected and that users cannot act on.

Each message is matched by its text, so that all others of the same logger still appear.
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
    "datasets.packaged_modules.json.json": "Failed to load JSON",  # the error that follows says the same
    "transformers.trainer_utils": "new PAD/BOS/EOS tokens",  # trainers set these tokens on purpose
    # A reward model starts with a new head. The report is shown if weights other than `score` are missing.
    "transformers.modeling_utils": r"ForSequenceClassification.* LOAD REPORT(?!(?s:.)*\n(?!score\.)\S+ +\| MISSING)|"
    r"The new (embeddings|lm_head weights) will be initialized",  # expected, since the special tokens of a chat template are added
}
"""Names of loggers, and a regular expression for the messages that are hidden."""

WARNED = (
    "Setting `save_embedding_layers` to `True`",  # intended: an adapter is saved with an enlarged vocabulary
    "`torch.distributed.all_gather_into_tensor` is deprecated",  # of torch 2.13, to DeepSpeed, in every step
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`is_gradient_checkpointing` is deprecated",  # peft reads a property that transformers renamed
)
"""Beginnings of the warnings that are hidden."""


OWN = ("trl.rewards", "trl.rollouts")
"""Loggers whose messages concern the samples of one process."""


def say_once() -> None:
    """Show warnings about options, rows and models only from the first process of a node, since they are the same in all.

    All processes still log errors, and warnings about their own samples. A logger whose level was set explicitly is left alone.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    for name, level in {"trl": logging.ERROR, **dict.fromkeys(OWN, logging.WARNING)}.items():
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(level)


def _without(noise: str) -> Callable[[logging.LogRecord], bool]:
    """A logging filter that drops messages in which the pattern `noise` is found."""
    return lambda record: not re.search(noise, record.getMessage())


FILTERS = {name: _without(noise) for name, noise in LOGGED.items()}


def silence() -> None:
    """Hide all messages in `LOGGED` and `WARNED` for the rest of the process. Calling it again has no effect."""
    for name, words in FILTERS.items():
        logging.getLogger(name).addFilter(words)
    _ignore_warnings()


def _ignore_warnings() -> None:
    for message in WARNED:
        warnings.filterwarnings("ignore", message=re.escape(message))


@contextmanager
def without_noise(*loggers: str) -> Iterator[None]:
    """Within the context, hide the messages in `LOGGED` of these loggers; without arguments, of all of them."""
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
    """Hold back messages of logger `name` that contain `words`: drop them if the block raises `error`, else emit them
    at its end."""
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
    """Within the context, hide the warnings in `WARNED`."""
    with warnings.catch_warnings():
        _ignore_warnings()
        yield
