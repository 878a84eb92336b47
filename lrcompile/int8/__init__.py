"""Weights in groups of small integers, as a method holds them that trains the weight itself."""
