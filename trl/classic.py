"""Small names that example scripts of earlier releases import, mostly from `trl.commands.cli_utils` and `trl.trainer.utils`.

They are found under those old paths, and not among the public names of `trl`: new scripts use what each points to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.utils import is_npu_available as is_npu_available
from accelerate.utils import is_xpu_available as is_xpu_available
from torch import nn

from trl.data.sources import ScriptArguments
from trl.errors import DataError
from trl.imports import is_available
from trl.rewards.reward import RewardFunction

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = dict.fromkeys(("ignore_bias_buffers", "gradient_checkpointing_use_reentrant"), "")
OLD_SPLITS = {"dataset_train_name": "dataset_train_split", "dataset_test_name": "dataset_test_split"}

# ---- arguments of scripts: `ScriptArguments` with other defaults ----


@dataclass
class SFTScriptArguments(ScriptArguments):
    """The dataset of a script for SFT."""

    ALIASES: ClassVar[dict[str, str]] = IGNORED
    dataset_name: list[str] | str | None = "timdettmers/openassistant-guanaco"


@dataclass
class RewardScriptArguments(ScriptArguments):
    """The dataset of a script for reward models."""

    ALIASES: ClassVar[dict[str, str]] = IGNORED
    dataset_name: list[str] | str | None = "trl-lib/ultrafeedback_binarized"


@dataclass
class DPOScriptArguments(ScriptArguments):
    """The dataset of a script for DPO."""

    ALIASES: ClassVar[dict[str, str]] = IGNORED
    sanity_check: bool = False
    """Read by the script, which then trains on 1,000 rows."""


@dataclass
class SftScriptArguments(ScriptArguments):
    """Dataset and options of a script for SFT that trains with `transformers.TrainingArguments`."""

    ALIASES: ClassVar[dict[str, str]] = IGNORED | OLD_SPLITS
    dataset_name: list[str] | str | None = "timdettmers/openassistant-guanaco"
    dataset_text_field: str | None = None
    """Column of texts, which the script gives to the trainer."""
    max_seq_length: int = 512
    """Maximum number of tokens, which the script gives to the trainer."""
    packing: bool = False
    """Pack rows; the script gives this to the trainer."""


@dataclass
class DpoScriptArguments(DPOScriptArguments):
    """Dataset and options of a script for DPO that trains with `transformers.TrainingArguments`."""

    beta: float = 0.1
    """β: strength of the KL regularisation, which the script gives to the trainer."""
    max_length: int = 512
    """Maximum number of tokens, which the script gives to the trainer."""
    max_prompt_length: int = 128
    """Maximum number of tokens of a prompt, which the script gives to the trainer."""
    max_target_length: int | None = None
    """Maximum number of tokens of an encoder-decoder's answer, which the script gives to the trainer."""
    generate_during_eval: bool = False
    """Sample in evaluations; the script gives this to the trainer."""


# ---- chat templates ----

SIMPLE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIMPLE_SFT_CHAT_TEMPLATE = "{% for message in messages %} {{ message['content'] }}{% endfor %}{{ eos_token }}"


def conversations_formatting_function(
    tokenizer: PreTrainedTokenizerBase, messages_field: str
) -> Callable[[Mapping[str, Any]], Any]:
    """A function that turns the conversation in a row's column into text, or those of a batch into texts."""

    def text_of(row: Mapping[str, Any]) -> Any:
        found = row.get(messages_field)
        if not found:
            raise DataError(f"column {messages_field!r} is missing or empty: it should have a conversation.")
        if isinstance(found[0], Mapping):
            return tokenizer.apply_chat_template(found, tokenize=False)
        return [tokenizer.apply_chat_template(each, tokenize=False) for each in found]

    return text_of


# ---- rewards ----

RewardFunc = RewardFunction | nn.Module | str
"""What a trainer takes as a reward function, for annotations."""


def aesthetic_scorer(hub_model_id: str, model_filename: str) -> Callable[..., tuple[Tensor, dict]]:
    """A reward function for `DDPOTrainer` and `AlignPropTrainer`: `AestheticReward`, its network from a hub's repository."""
    from huggingface_hub import hf_hub_download

    from trl.rewards.clip import AestheticReward

    reward = AestheticReward(head=hf_hub_download(hub_model_id, model_filename))
    return lambda images, prompts, metadata: (reward(images.clamp(0, 1)), {})


def build_bert_batch_from_txt(
    text_list: Sequence[str], tokenizer: PreTrainedTokenizerBase, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[B,T]` of texts, for a classifier that scores them."""
    batch = tokenizer(list(text_list), padding=True, return_tensors="pt").to(device)
    return batch["input_ids"], batch["attention_mask"]


# ---- the environment ----

TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")


def strtobool(val: str) -> bool:
    """The truth value of an environment variable such as "yes", "off" or "1"."""
    if val.lower() not in TRUE + FALSE:
        raise ValueError(f"{val!r} is neither true nor false: give one of {', '.join(TRUE + FALSE)}.")
    return val.lower() in TRUE


def init_zero_verbose() -> None:
    """Show only errors in logs, and warnings through them."""
    logging.basicConfig(level=logging.ERROR)
    logging.captureWarnings(True)


is_bitsandbytes_available = partial(is_available, "bitsandbytes")
is_deepspeed_available = partial(is_available, "deepspeed")
is_diffusers_available = partial(is_available, "diffusers")
is_liger_kernel_available = partial(is_available, "liger_kernel")
is_mergekit_available = partial(is_available, "mergekit")
is_peft_available = partial(is_available, "peft")
is_rich_available = partial(is_available, "rich")
is_unsloth_available = partial(is_available, "unsloth")
is_vllm_available = partial(is_available, "vllm")
is_wandb_available = partial(is_available, "wandb")
