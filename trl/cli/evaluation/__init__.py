"""The command `trl eval`."""
