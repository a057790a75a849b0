"""Refuse an index of weight files that names files outside of the model's own folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trl.errors import ModelError


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
