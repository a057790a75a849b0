"""`python -m trlx.sweep --config sweep.yml script.py`: another name of `trl sweep`, which existing scripts use."""

from __future__ import annotations

import sys

from trl.cli.main import main

NEEDLESS = ("-y", "--yes")
"""Options that trlX needs to skip a confirmation; `trl sweep` asks for none, so they are dropped."""

if __name__ == "__main__":
    sys.exit(main(["sweep", *(word for word in sys.argv[1:] if word not in NEEDLESS)]))
