"""Device memory that the LocalEngine needs for sampling, besides the model's weights:

KV cache             of the prompts and completions of a rollout batch, at most `TOKENS_ALIVE` tokens at a time
half-precision copy  of float32 weights, if they are rounded for sampling: see `trl.models.half_weights`
sampling             logits, probabilities and cumulative sums for one token of every completion
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from trl.models.memory import cache_bytes
from trl.rollouts.local import TOKENS_ALIVE
from trl.trainers.heaviest import row_positions
from trl.trainers.online_config import OnlineConfig

DRAWN_FROM = 3
"""Float32 numbers per vocabulary entry and completion while a token is sampled: logit, probability, cumulative sum."""


def sampling_bytes(args: OnlineConfig, model: PreTrainedModel, rows: Dataset | Sequence[Mapping[str, Any]]) -> int:
    """Bytes that sampling a rollout batch takes if all completions reach their maximum length.

    `rows` are the encoded prompts; the longest one counts.
    """
    limit = args.max_completion_length or 512
    tokens = int(row_positions(rows).max()) + limit
    count = args.prompts_per_rollout_batch * args.num_generations
    held, together = min(count * tokens, max(tokens, TOKENS_ALIVE)), min(count, max(1, TOKENS_ALIVE // limit))
    width = next(model.parameters()).element_size()
    is_rounded = rounds_weights(args) and width > 2
    cache = cache_bytes(model.config, sequences=1, tokens=held, bytes_per_number=2 if is_rounded else width)
    rounded = sum(2 * p.numel() for p in model.parameters() if p.dim() > 1) if is_rounded else 0
    return cache + rounded + DRAWN_FROM * 4 * together * model.config.get_text_config(decoder=True).vocab_size


def rounds_weights(args: OnlineConfig) -> bool:
    """Whether the engine samples from a half-precision copy of float32 weights."""
    return args.device.type == "cuda" and (args.bf16 or args.fp16)
