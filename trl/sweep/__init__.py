"""Hyperparameter sweeps: run one script with many settings, and compare the trials in a table."""
