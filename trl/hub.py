"""What the hub's client does here that is not about the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_session


@contextmanager
def outside_the_hub() -> Iterator[None]:
    """HF_HUB_OFFLINE is about the hub: within, the client's session asks other servers all the same."""
    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {}
    try:
        yield
    finally:
        session.event_hooks = hooks
