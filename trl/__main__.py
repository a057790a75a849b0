"""`python -m trl` is the command `trl`."""

import sys

from trl.cli.main import main

sys.exit(main())
