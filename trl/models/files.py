"""Files that hold a model's weights, as far as they can be known without importing anything that reads or writes them."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

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


def follow_umask(folder: str | Path) -> None:
    """Give safetensors files in a folder, which their library writes for the owner alone, the mode of other new files."""
    files = [path for path in Path(folder).glob("*.safetensors") if path.is_file()]
    if not files:
        return
    with TemporaryDirectory(dir=folder) as beside:  # os.umask is read by changing it, for all threads
        probe = Path(beside, "probe")
        probe.touch()
        mode = probe.stat().st_mode & 0o777
    for file in files:
        with suppress(OSError):  # file systems without modes
            file.chmod(mode)
