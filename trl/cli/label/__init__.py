"""`trl label`: its options, and completions that are sampled for it."""
