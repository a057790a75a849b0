"""Memory that sampling in process takes besides the weights.

keys and values      of every prompt and completion of a rollout batch
rounded weights      where float32 weights are rounded for a rollout batch: see `trl.models.half_weights`
drawing              logits, probabilities and their sums of one token of every completion
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from trl.data.encode import decode
from trl.models.memory import cache_bytes
from trl.trainers.online_config import OnlineConfig

DRAWN_FROM = 3
"""Numbers for each token of the vocabulary from which a row draws: logits, probabilities, their sums."""


def sampling_bytes(args: OnlineConfig, model: PreTrainedModel, rows: Dataset | Sequence[Mapping[str, Any]]) -> int:
    """Bytes that a rollout batch takes on its device where all samples are as long as they may become.

    `rows` are the encoded rows of the prompts.
    """
    prompts = max(len(example.prompt) for row in rows for example in decode(row))
    tokens = prompts + (args.max_completion_length or 512)
    count = args.per_device_train_batch_size * args.gradient_accumulation_steps
    width = next(model.parameters()).element_size()
    is_rounded = rounds_weights(args) and width > 2
    cache = cache_bytes(model.config, sequences=count, tokens=tokens, bytes_per_number=2 if is_rounded else width)
    rounded = sum(2 * p.numel() for p in model.parameters() if p.dim() > 1) if is_rounded else 0
    return cache + rounded + DRAWN_FROM * 4 * count * model.config.get_text_config(decoder=True).vocab_size


def rounds_weights(args: OnlineConfig) -> bool:
    """Whether float32 weights are rounded for a rollout batch."""
    return args.device.type == "cuda" and (args.bf16 or args.fp16)
