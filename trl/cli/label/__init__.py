"""The command `trl label`."""
