"""`python -m trlx.sweep --config sweep.yml script.py`: see `trl.cli.sweep`."""

from __future__ import annotations

import sys

from trl.cli.sweep import run
from trl.errors import ConfigError


def main() -> int:
    """The command; its exit status."""
    try:
        return run(sys.argv[1:], "python -m trlx.sweep")
    except ConfigError as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
