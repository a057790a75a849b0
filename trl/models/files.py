"""Files that hold a model's weights, as far as they can be known without importing anything that reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

WEIGHTS = re.compile(
    r"(adapter_|(diffusion_)?pytorch_)?model.*\.(safetensors|bin)|pytorch_lora_weights\.safetensors|.+\.gguf"
)
"""Whole, or cut in files that can be read one by one; those of `diffusers` among them."""

SHARDS = re.compile(r".*_fsdp_\d+|global_step\d+")
"""Folders of what several processes keep of one model: FSDP's and ZeRO's."""

NUMBER = 8
"""Bytes of the number that a safetensors file begins with: the length of its header, which says where each tensor ends."""


def is_cut_short(file: Path) -> bool:
    """Whether a safetensors file is shorter, or longer, than its header says."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(NUMBER), "little")
        if NUMBER + length > size:
            return True
        header = json.loads(opened.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return NUMBER + length + max(ends, default=0) != size
