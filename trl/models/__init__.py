"""Models: loading, scoring, value heads, references. `from trl.models import NAME` finds the public names of `trl`."""

from trl.compat import name_of_trl as __getattr__

__all__ = ["__getattr__"]
