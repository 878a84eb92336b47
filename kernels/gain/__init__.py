"""The gradients of a gain on the outputs of a map."""
