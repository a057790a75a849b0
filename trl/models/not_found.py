"""Explain why a model cannot be found by its name: what is wrong with the folder, or what the hub answered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl.errors import ModelNotFoundError, TrlError, suggest, suggest_beside
from trl.models.files import WEIGHTS, is_cut_short

CONFIGS = ("config.json", "adapter_config.json", "model_index.json")
"""Files that mark the folder of a model, of an adapter, and of a `diffusers` pipeline."""


@contextmanager
def explain_missing(name: str, subject: str = "", subfolder: str | None = None) -> Iterator[None]:
    """Turn errors of loading `name` into a ModelNotFoundError if there is no such model. Other errors pass.

    The message begins with `subject`, by default "model='name'". `subfolder` is the place of the model within `name`.
    """
    subject = subject or f"model={name!r}"
    try:
        yield
    except TrlError:
        raise
    except (OSError, ValueError) as error:
        place = os.path.join(name, subfolder or "")
        check_folder(place, subject)
        if isinstance(error, OSError):
            check_weights(place, subject)
        if Path(name).exists() or (reason := refusal(error)) is None:
            raise
        near = suggest(name, [each.name for each in Path().iterdir() if each.is_dir()])
        raise ModelNotFoundError(f"{subject} is no folder here and not in the cache, and {reason}{near}") from error


def check_folder(name: str, subject: str) -> str:
    """`name` with `~` expanded. Raises ModelNotFoundError for a folder that does not exist or has no model."""
    folder = Path(name).expanduser()
    if not folder.exists() and not name.startswith(("/", "./", "../", "~")):
        return name
    if folder.is_file():
        raise ModelNotFoundError(f"{subject} is a file: give the folder of a model, or its hub name.")
    if not folder.is_dir():
        raise ModelNotFoundError(f"{subject}: there is no such folder.{suggest_beside(folder)}")
    inside = sorted(each.name for each in folder.iterdir())
    if not set(CONFIGS) & set(inside):
        checkpoints = [each for each in inside if each.startswith("checkpoint-")]
        instead = f" Did you mean '{Path(name, checkpoints[-1])}'?" if checkpoints else ""
        raise ModelNotFoundError(f"{subject} holds no model: config.json is missing.{instead}")
    return os.path.expanduser(name)


def check_weights(name: str, subject: str) -> None:
    """Raises ModelNotFoundError for a model's folder without weights, or with truncated ones. Hub names are not checked."""
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        return
    files = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name)]
    if not files:
        raise ModelNotFoundError(
            f"{subject}: the folder holds no weights (no model*.safetensors or pytorch_model*.bin). Copy them there, or name "
            "another."
        )
    for file in files:
        if file.suffix == ".safetensors" and is_cut_short(file):
            raise ModelNotFoundError(f"{subject}: {file.name} is cut short. Copy it there again.")


def refusal(error: BaseException | None) -> str | None:
    """Explain an error of the hub, found in `error` or its causes; None if the hub has nothing to do with it."""
    from huggingface_hub import constants, errors

    transport: Any = errors.InferenceTimeoutError.__bases__[0]
    offline = "the hub is not queried in offline mode (HF_HUB_OFFLINE)."
    unreachable = "the hub cannot be reached ({kind})."
    nothing = "the hub has nothing of that name, or it is private (`hf auth login`)."
    reasons = {
        errors.OfflineModeIsEnabled: offline,
        errors.LocalEntryNotFoundError: offline if constants.HF_HUB_OFFLINE else unreachable,
        errors.GatedRepoError: "you have to accept its terms on the hub first, then run `hf auth login`.",
        errors.RevisionNotFoundError: "the hub does not have that model_revision.",
        errors.RepositoryNotFoundError: nothing,
        errors.HFValidationError: nothing,
        errors.LocalTokenNotFoundError: "you are not logged in to the hub: run `hf auth login`, or set HF_TOKEN.",
        errors.HfHubHTTPError: "the hub refuses: {told}",
        transport: unreachable,
        ConnectionError: unreachable,
        TimeoutError: unreachable,
    }
    while error is not None:
        if (reason := next((words for kind, words in reasons.items() if isinstance(error, kind)), None)) is not None:
            return reason.format(told=" ".join(str(error).split())[:300], kind=type(error).__name__)
        error = error.__cause__ or error.__context__
    return None
