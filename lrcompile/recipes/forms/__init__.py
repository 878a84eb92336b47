"""Adapter forms: the module that holds one site's added tensors and says what they compute."""
