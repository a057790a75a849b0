"""Collect human feedback: a local web page on which people rate, compare or correct completions."""
