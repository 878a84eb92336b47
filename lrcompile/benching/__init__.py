"""`lrcompile bench methods`: every method on the same small tasks, at the same number of trained parameters."""
