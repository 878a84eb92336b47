"""Auxiliary losses: what a method adds to the model's. Each is a function `(adapters, spec)` a recipe names."""
