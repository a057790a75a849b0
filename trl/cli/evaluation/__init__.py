"""`trl eval`: its options, and the models that it loads."""
