"""Options of `trl serve`, each documented once."""

from __future__ import annotations

from dataclasses import dataclass

from trl.option_bounds import check_bounds

KEY = "VLLM_API_KEY"
"""The environment variable that holds the key; `vllm serve` reads the same."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeArguments:
    """Where a model is served, to whom, and within which limits."""

    host: str = "127.0.0.1"
    """Address to listen at. The default is this machine alone; "0.0.0.0" is every network that it is in."""

    port: int = 8000
    """Port to listen at. 0: any free one."""

    api_key: str | None = None
    """Key that requests have to carry (`Authorization: Bearer KEY`). None: as the environment variable VLLM_API_KEY says, or
    none is asked for."""

    served_model_name: str | None = None
    """Name under which requests ask for the model. None: as it was given."""

    device: str = "auto"
    """Device of the model: "cpu", "cuda:0", …; "auto" spreads it over the accelerators, if there are any."""

    chat_template_kwargs: dict | None = None
    """Arguments for the chat template."""

    max_tokens_alive: int = 65_536
    """Tokens that prompts and samples under way may hold together; further samples wait."""

    max_request_tokens: int = 4_194_304
    """Tokens that one request may ask for at most: its prompts and completions, every sample counted."""

    max_request_megabytes: float = 64.0
    """Size of a request's body at most."""

    max_request_pixels: int = 67_108_864
    """Pixels that the images of one request may have at most, all together."""

    max_waiting: int = 1024
    """Requests that may wait for the model at most; further ones are told to come back (status 503)."""

    request_timeout: float = 600.0
    """Seconds after which a request is given up (status 504)."""

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def is_private(self) -> bool:
        """Whether this machine alone can reach the server."""
        return self.host in LOOPBACK
