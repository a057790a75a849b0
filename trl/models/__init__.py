"""Models: loading, scoring, value heads, references. `from trl.models import NAME` finds the public names of `trl`."""

from trl.compat.names import names_for

__getattr__ = names_for("trl.models")
