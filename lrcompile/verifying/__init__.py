"""What `verify` and `golden` are made of: the float64 reference, its bounds, candidates, comparisons, manifests."""
