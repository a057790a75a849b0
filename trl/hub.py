"""Use of the hub client's HTTP session for requests to other servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_session


@contextmanager
def outside_the_hub() -> Iterator[None]:
    """Within the context, the client's session also sends requests with HF_HUB_OFFLINE=1, which is meant for the hub alone."""
    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {}
    try:
        yield
    finally:
        session.event_hooks = hooks
