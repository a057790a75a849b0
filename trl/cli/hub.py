"""Check models and permissions on the Hugging Face Hub before work starts, and report failures as one-line errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl.errors import ConfigError
from trl.models.not_found import explain_missing, refusal

if TYPE_CHECKING:
    from trl.trainers.config import TrainerConfig

PATIENCE = 10.0
"""Timeout of a request to the hub, in seconds."""

FILES = ("config.json", "adapter_config.json")


class HubError(OSError):
    """The hub refused a request, or could not be reached."""


def check_model_on_hub(name: str, revision: str) -> None:
    """Raises ConfigError if a model is neither a folder, nor in the cache, nor on the hub, or the hub cannot be
    reached."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(name).exists() or any(isinstance(try_to_load_from_cache(name, file), str) for file in FILES):
        return
    with explain_missing(name, f"model_name_or_path={name!r}"):
        HfApi().model_info(name, revision=revision, timeout=PATIENCE)


def check_push(training: TrainerConfig) -> None:
    """Raises ConfigError if a push after training would fail: no network, or not logged in."""
    from huggingface_hub import HfApi

    with _explained("push_to_hub=True"):
        HfApi(token=training.hub_token).whoami()


@contextmanager
def push_explained(folder: str) -> Iterator[None]:
    """Turn a failed push after training into a HubError that says where the model is and how to upload it later."""
    try:
        with _explained(f"The model is in {folder}, but it was not pushed"):
            yield
    except ConfigError as error:
        raise HubError(f"{error} Later: hf upload REPOSITORY {folder}") from error


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an error of the hub into a one-line ConfigError that starts with `what`."""
    from huggingface_hub import errors

    transport: Any = errors.InferenceTimeoutError.__bases__[0]
    try:
        yield
    except (OSError, ValueError, transport) as error:
        if (reason := refusal(error)) is None:
            raise
        raise ConfigError(f"{what}, and {reason}") from error
