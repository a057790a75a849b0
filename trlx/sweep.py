"""`python -m trlx.sweep --config sweep.yml script.py`: `trl sweep` by the name that scripts call it."""

from __future__ import annotations

import sys

from trl.cli.main import main

NEEDLESS = ("-y", "--yes")
"""Options that answer a question which is not asked here."""

if __name__ == "__main__":
    sys.exit(main(["sweep", *(word for word in sys.argv[1:] if word not in NEEDLESS)]))
