"""Configurations of ILQL and PPO, at the paths from which scripts import them."""
