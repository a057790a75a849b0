"""Options of `trl serve`."""

from __future__ import annotations

from dataclasses import dataclass

from trl.option_bounds import check_bounds

KEY = "VLLM_API_KEY"
"""The environment variable that holds the key; `vllm serve` reads the same."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeArguments:
    """Address, access and limits of the server."""

    host: str = "127.0.0.1"
    """Address to listen on. By default only this machine can connect; "0.0.0.0" listens on all networks."""

    port: int = 8000
    """Port to listen on; 0 for any free one."""

    api_key: str | None = None
    """API key that requests must send (`Authorization: Bearer KEY`). None: the value of the environment variable
    VLLM_API_KEY; without that, no key is needed."""

    served_model_name: str | None = None
    """Name of the model in requests. None: the name or folder that the model was loaded from."""

    device: str = "auto"
    """Device of the model: "cpu", "cuda:0", …; "auto" spreads it over all available accelerators, else uses the CPU."""

    chat_template_kwargs: dict | None = None
    """Arguments for the chat template."""

    max_tokens_alive: int = 65_536
    """Maximum total tokens of prompts and samples that are generated concurrently; further samples wait."""

    max_request_tokens: int = 4_194_304
    """Maximum tokens per request: its prompts, and the token limits of all samples."""

    max_request_megabytes: float = 64.0
    """Maximum size of a request body in MiB."""

    max_request_pixels: int = 67_108_864
    """Maximum total pixels of the images in one request."""

    max_waiting: int = 1024
    """Maximum number of requests that wait for the model; further ones are refused (status 503)."""

    request_timeout: float = 600.0
    """Seconds after which a request is cancelled (status 504)."""

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def is_private(self) -> bool:
        """True if only this machine can reach the server."""
        return self.host in LOOPBACK
