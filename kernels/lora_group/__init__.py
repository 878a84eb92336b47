"""Linear maps that share their input, each with a low-rank pair beside it."""
