"""Norms of the rows of a weight and a low-rank pair together, without the weight that they add up to."""
