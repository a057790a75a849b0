"""What is sent to samplers of the policy: all of its weights, or its adapter alone, as files that `from_pretrained` reads."""

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
    """Why the policy's adapter cannot be sent alone; None where it can.

    vLLM samples with one plain LoRA of one rank: see its page on LoRA adapters.
    """
    if not isinstance(policy, PeftModel):
        return "the model has no adapter"
    config = policy.peft_config[policy.active_adapters[0]]
    if not isinstance(config, LoraConfig):
        return f"its adapter is no LoRA but {config.peft_type.value}"
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
        "it adapts what reads images, which vLLM's adapters do not": not all(server.is_own for server in servers)
        and bool(image_token_ids(policy.config))
        and any("lora_" in name for name in encoder_parameters(base_of(policy))),
        "a server takes no adapters (--enable-lora)": not all(server.takes_adapters for server in servers),
        "its rank is above a server's --max-lora-rank": any(
            server.max_lora_rank is not None and config.r > server.max_lora_rank for server in servers
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def write_weights(model: nn.Module, folder: Path | None) -> None:
    """All weights of the policy, adapters merged, as a checkpoint in `folder`. All processes take part; None writes nothing."""
    state = {}
    for name, tensor in gathered_parameters(model):
        if folder is not None:
            state[name] = tensor.cpu().contiguous()
        del tensor  # before the next one is gathered
    if folder is not None:
        with _quiet():
            base_of(policy_of(model)).save_pretrained(folder, state_dict=state)


def write_adapter(model: nn.Module, folder: Path | None) -> None:
    """The policy's adapter alone, as `peft` saves it. All processes take part; None writes nothing."""
    policy = policy_of(model)
    assert isinstance(policy, PeftModel)
    name = policy.active_adapters[0]
    state = gathered_adapter(policy, name)
    if folder is None:
        return
    policy.save_pretrained(folder, selected_adapters=[name], state_dict=state, save_embedding_layers=False)
    if name != "default":  # peft saves it in a folder of its name
        inner = folder / name
        for file in inner.iterdir():
            file.rename(folder / file.name)
        inner.rmdir()


def publish(
    folders: WeightFolders | None, model: nn.Module, step: int, write: Callable[[nn.Module, Path | None], None]
) -> Path | None:
    """The folder with what `write` writes of the policy, on the main process, whose `folders` these are; None on the others.

    All processes gather, and where the main one fails to write, all raise its EngineError.
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
    """Raise on all processes what has failed on the main one; all call."""

    def tell() -> None:
        if error is not None:
            raise error

    run_on_main(tell)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar for every step's weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
