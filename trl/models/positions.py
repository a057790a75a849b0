"""The longest sequence that a model can read: by its learned position embeddings, or by its configuration."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from trl.vision.families import image_token_ids

_NAMES = re.compile(r"(^|[._])(wpe|position_embeddings?|embed_positions|pos_embed\w*|position_embedding_table)$")


def learned_positions(model: nn.Module) -> int | None:
    """Number of positions with learned embeddings; None if positions are computed (rotary, ALiBi, relative).

    Some tables start with rows that no token uses (an offset in OPT and BART, padding in RoBERTa), which do not count. The
    position embeddings of an image encoder are ignored.
    """
    reads_images = isinstance(model, PreTrainedModel) and image_token_ids(model.config)
    tables = [
        module.num_embeddings - _offset(module)
        for name, module in (model.get_decoder() if reads_images else model).named_modules()
        if isinstance(module, nn.Embedding) and _NAMES.search(name)
    ]
    return min(tables, default=None)


def pretrained_length(model: nn.Module) -> int | None:
    """The longest sequence, in tokens, for which a model with computed positions was trained or scaled.

    Scaled rotary embeddings multiply the original length by `factor`. None if the configuration has no length, or if the model
    has learned position embeddings.
    """
    if not isinstance(model, PreTrainedModel) or learned_positions(model) is not None:
        return None
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    rope = vars(config).get("rope_parameters") or {}
    scaled = [each for each in (rope, *rope.values()) if isinstance(each, dict) and each.get("factor")]
    return max([most, *(int(r.get("original_max_position_embeddings", most) * r["factor"]) for r in scaled)])


def _offset(table: nn.Embedding) -> int:
    if isinstance(offset := vars(table).get("offset"), int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1
