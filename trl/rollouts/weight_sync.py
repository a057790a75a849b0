"""Write the policy for samplers, as files that `from_pretrained` reads: all weights, or the adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from trl.errors import EngineError
from trl.models.gathering import base_of, gathered_adapter, gathered_parameters, policy_of
from trl.models.image_features import encoder_parameters
from trl.rollouts.server_info import ServerInfo
from trl.rollouts.weight_folders import WeightFolders
from trl.training.collectives import run_on_main
from trl.vision.families import image_token_ids


def needs_merged_weights(policy: PreTrainedModel | PeftModel, servers: Sequence[ServerInfo]) -> str | None:
    """The reason why the policy's adapter cannot be sent alone, and has to be merged into the weights; None if it can.

    vLLM supports one plain LoRA adapter with a single rank: see its page on LoRA adapters.
    """
    if not isinstance(policy, PeftModel):
        return "the model has no adapter"
    config = policy.peft_config[policy.active_adapters[0]]
    if not isinstance(config, LoraConfig):
        return f"its adapter is {config.peft_type.value}, not LoRA"
    reasons = {
        "several adapters are active": len(policy.active_adapters) > 1,
        "it is a DoRA": config.use_dora,
        "it trains biases": config.bias != "none",
        "it has modules_to_save": bool(config.modules_to_save),
        "it trains tokens of the embeddings": bool(config.trainable_token_indices),
        "it adapts parameters by name (target_parameters)": bool(config.target_parameters),
        "its ranks differ (rank_pattern)": bool(config.rank_pattern),
        "its scales differ (alpha_pattern)": bool(config.alpha_pattern),
        "it repeats layers": bool(config.layer_replication),
        "weights below the adapter are trained": any(
            p.requires_grad and "lora_" not in name for name, p in base_of(policy).named_parameters()
        ),
        "it adapts the image encoder, which vLLM does not support": not all(server.is_own for server in servers)
        and bool(image_token_ids(policy.config))
        and any("lora_" in name for name in encoder_parameters(base_of(policy))),
        "a server takes no adapters (--enable-lora)": not all(server.takes_adapters for server in servers),
        "its rank is above a server's --max-lora-rank": any(
            server.max_lora_rank is not None and config.r > server.max_lora_rank for server in servers
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def write_weights(model: nn.Module, folder: Path | None) -> None:
    """Save all weights of the policy, adapters merged, as a checkpoint in `folder`.

    A collective call: processes with None for `folder` only take part in gathering.
    """
    state = {}
    for name, tensor in gathered_parameters(model):
        if folder is not None:
            state[name] = tensor.cpu().contiguous()
        del tensor  # free it before the next one is gathered
    if folder is not None:
        with _quiet():
            base_of(policy_of(model)).save_pretrained(folder, state_dict=state)


def write_adapter(model: nn.Module, folder: Path | None) -> None:
    """Save the policy's adapter alone, in the format of `peft`.

    A collective call: processes with None for `folder` only take part in gathering.
    """
    policy = policy_of(model)
    assert isinstance(policy, PeftModel)
    name = policy.active_adapters[0]
    state = gathered_adapter(policy, name)
    if folder is None:
        return
    policy.save_pretrained(folder, selected_adapters=[name], state_dict=state, save_embedding_layers=False)
    if name != "default":  # peft saves it in a subfolder with the adapter's name
        inner = folder / name
        for file in inner.iterdir():
            file.rename(folder / file.name)
        inner.rmdir()


def publish(
    folders: WeightFolders | None, model: nn.Module, step: int, write: Callable[[nn.Module, Path | None], None]
) -> Path | None:
    """Write the policy with `write` as version `step`, and return its folder on the main process, None on the others.

    `folders` is None except on the main process. All processes take part in gathering; if writing fails on the main process,
    all of them raise its EngineError.
    """
    error, folder = None, None
    if folders is None:
        write(model, None)
    else:
        try:
            folder = folders.publish(str(step), lambda path: write(model, path))
        except EngineError as failed:
            error = failed

    raise_everywhere(error)
    return folder


def raise_everywhere(error: BaseException | None) -> None:
    """Raise the main process's `error`, if any, on all processes; a collective call."""

    def tell() -> None:
        if error is not None:
            raise error

    run_on_main(tell)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, saving shows no progress bar, which would appear again for every step's weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
