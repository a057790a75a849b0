"""Names and checks of weight files and their indices, without importing a library that reads or writes them."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from trl.errors import ModelError

WEIGHTS = re.compile(
    r"(adapter_|(diffusion_)?pytorch_)?model.*\.(safetensors|bin)|pytorch_lora_weights\.safetensors|.+\.gguf"
)
"""Names of weight files, in one file or several, of `transformers`, peft and `diffusers`."""

SHARDS = re.compile(r".*_fsdp_\d+|global_step\d+")
"""Names of folders with sharded checkpoints of FSDP and ZeRO."""

NUMBER = 8
"""Bytes of the integer at the start of a safetensors file: the length of its header, which has the offsets of all tensors."""


def is_cut_short(file: Path) -> bool:
    """Whether the size of a safetensors file differs from that in its header, as after an interrupted copy."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(NUMBER), "little")
        if NUMBER + length > size:
            return True
        header = json.loads(opened.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return NUMBER + length + max(ends, default=0) != size


def is_inside(name: str) -> bool:
    """Whether a relative file name stays within its folder."""
    return not os.path.isabs(name) and not os.path.normpath(name).startswith(os.pardir)


def check_shards(folder: str | Path) -> None:
    """Raise ModelError if the weight index of a folder names files outside of it. Hub names are not checked."""
    for index in Path(folder).glob("*.index.json") if os.path.isdir(folder) else ():
        for shard in set(json.loads(index.read_text())["weight_map"].values()):
            if not is_inside(shard):
                raise ModelError(
                    f"{index.name} in {str(folder)!r} names the file {shard!r}, which is not in that folder. Weights are "
                    "read from the model's own folder only: do not use this model, or put the file there."
                )


def follow_umask(folder: str | Path) -> None:
    """Set the file mode of safetensors files in a folder by the umask: the library makes them readable by the owner only."""
    files = [path for path in Path(folder).glob("*.safetensors") if path.is_file()]
    if not files:
        return
    with TemporaryDirectory(dir=folder) as beside:  # os.umask can only be read by setting it, for all threads
        probe = Path(beside, "probe")
        probe.touch()
        mode = probe.stat().st_mode & 0o777
    for file in files:
        with suppress(OSError):  # file systems without modes
            file.chmod(mode)
