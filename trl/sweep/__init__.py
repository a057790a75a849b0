"""Sweeps: one script, many settings, a table that compares them."""
