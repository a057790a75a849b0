"""`python -m trl` runs the command `trl`."""

import sys

from trl.cli.main import main

sys.exit(main())
