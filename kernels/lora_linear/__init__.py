"""A linear map and a low-rank pair beside it, in one product."""
