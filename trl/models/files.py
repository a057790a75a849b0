"""Names of files that hold a model's weights. Nothing is imported to know them."""

from __future__ import annotations

import re

WEIGHTS = re.compile(r"(adapter_|pytorch_)?model.*\.(safetensors|bin)|.+\.gguf")
"""Whole, or cut in files that can be read one by one."""

SHARDS = re.compile(r".*_fsdp_\d+|global_step\d+")
"""Folders of what several processes keep of one model: FSDP's and ZeRO's."""
