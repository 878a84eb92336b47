"""Weights as small integers in blocks of a row, the storage that runtimes multiply by directly."""
