"""Initialisers: how a form's tensors start. Each is a function `(adapter, start)` a recipe names."""
