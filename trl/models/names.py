"""Names of models that stand for nothing: what is wrong with a folder, or what the hub says, with what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl.errors import ModelNotFoundError, TrlError, suggest, suggest_beside
from trl.models.files import WEIGHTS, is_cut_short

CONFIGS = ("config.json", "adapter_config.json", "model_index.json")
"""What a model, an adapter and a pipeline of `diffusers` are known by."""


@contextmanager
def explain_missing(name: str, subject: str = "", subfolder: str | None = None) -> Iterator[None]:
    """Raises ModelNotFoundError where a library cannot load what `name` stands for, and it is the name's fault.

    The message begins with `subject`, `model='name'` if left out. `subfolder` is where in the folder the model is.
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
    """The name, with `~` written out. Raises ModelNotFoundError for a folder that is not there or holds no model."""
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
    """Raises ModelNotFoundError for a model's folder without whole weights. Names on a hub are not looked up."""
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
    """What the hub refuses, by an error or those that it came from; None where it has nothing to do with that."""
    from huggingface_hub import constants, errors

    transport: Any = errors.InferenceTimeoutError.__bases__[0]
    offline = "the hub is not asked in offline mode (HF_HUB_OFFLINE)."
    unreachable = "the hub cannot be reached ({kind})."
    nothing = "the hub has nothing of that name, or it is private (`hf auth login`)."
    reasons = {
        errors.OfflineModeIsEnabled: offline,
        errors.LocalEntryNotFoundError: offline if constants.HF_HUB_OFFLINE else unreachable,
        errors.GatedRepoError: "on the hub its terms have to be accepted first; then `hf auth login`.",
        errors.RevisionNotFoundError: "the hub does not have that model_revision.",
        errors.RepositoryNotFoundError: nothing,
        errors.HFValidationError: nothing,
        errors.LocalTokenNotFoundError: "nobody is logged in on the hub: `hf auth login`, or set HF_TOKEN.",
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
