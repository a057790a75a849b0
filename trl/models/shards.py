"""Where the index of sharded weights says that they are: in its own folder, or it is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trl.errors import ModelError


def is_inside(name: str) -> bool:
    """Whether a file named so in a folder is in it."""
    return not os.path.isabs(name) and not os.path.normpath(name).startswith(os.pardir)


def check_shards(folder: str | Path) -> None:
    """Raise ModelError for a folder whose index of weights names files elsewhere; names on the hub are not looked at."""
    for index in Path(folder).glob("*.index.json") if os.path.isdir(folder) else ():
        for shard in set(json.loads(index.read_text())["weight_map"].values()):
            if not is_inside(shard):
                raise ModelError(
                    f"{index.name} in {str(folder)!r} names the file {shard!r}, which is not in that folder. Weights are "
                    "read from the model's own folder only: do not use this model, or put the file there."
                )
