"""Human feedback during training: a trainer serves the page, and waits for answers.

ask = LiveLabels("rate", "ratings.jsonl", ServerSettings(port=8765))
answers = ask([Item("Is it far?", ("Two hours by train.",))])       # waits for an answer: [{"ada": 4}]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trl.label.session import Session
from trl.label.settings import ServerSettings
from trl.label.tasks import Answer, Item

PAUSE = 0.5
"""Seconds between checks for Ctrl-C while waiting."""


class LiveLabels:
    """Serves the page from the first question until `close`, or the end of the process.

    say   function that announces the address of the page
    """

    def __init__(
        self,
        task: str,
        output: str | Path,
        settings: ServerSettings,
        *,
        raters_per_item: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self.task, self.output, self.settings = task, Path(output), settings
        self.raters_per_item, self.say = raters_per_item, say
        self._running: tuple[Session, object] | None = None

    @property
    def session(self) -> Session:
        """The session. The first access starts the server."""
        if self._running is None:
            from trl.label.server import LabelServer

            session = Session(self.task, self.output, raters_per_item=self.raters_per_item, live=True)
            server = LabelServer(session, self.settings).__enter__()
            self._running = session, server
            self.say(f"People are asked on {server.url}" + (f" and {server.lan_url}" if server.lan_url else ""))
        return self._running[0]

    def __call__(self, items: Sequence[Item]) -> list[Mapping[str, Answer]]:
        """Wait until all items are judged or skipped, and return the answers to each by rater. Earlier answers are
        reused."""
        session = self.session
        keys = session.add(items)
        while not session.wait(keys, timeout=PAUSE):
            pass
        return [_for(item, session, key) for item, key in zip(items, keys, strict=True)]

    def close(self) -> None:
        if self._running is not None:
            session, server = self._running
            server.__exit__(None, None, None)
            session.close()
            self._running = None


def _for(item: Item, session: Session, key: str) -> Mapping[str, Answer]:
    """The answers for the item's order of completions, which may be the reverse of the order in the session."""
    answers = session.answers.get(key, {})
    if session.items[key].completions == item.completions:
        return dict(answers)
    return {rater: 1 - value if type(value) is int else value for rater, value in answers.items()}
