"""Options of methods, where scripts import them from."""
