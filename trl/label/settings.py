"""Settings of the labelling server: port, network access and token."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from trl.errors import ConfigError
from trl.option_bounds import check_bounds

LOCAL, EVERYWHERE = "127.0.0.1", "0.0.0.0"


@dataclass(frozen=True)
class ServerSettings:
    """port           port to listen on; 0 for any free one
    share_on_lan   listen on all network addresses; browsers then need the token
    token          access token. None: a random one with `share_on_lan`, else none is needed
    guidelines     text that the page shows to raters
    """

    port: int = 0
    share_on_lan: bool = False
    token: str | None = None
    guidelines: str = ""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.token is not None and len(self.token) < 8:
            raise ConfigError("token is too short: give at least 8 characters, or leave it out for a random one.")

    @property
    def host(self) -> str:
        return EVERYWHERE if self.share_on_lan else LOCAL

    def with_token(self) -> str | None:
        """The token that browsers must give, made at random if needed; None if no token is needed."""
        return self.token or (secrets.token_urlsafe(16) if self.share_on_lan else None)
