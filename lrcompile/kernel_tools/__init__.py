"""What every Triton kernel shares: how it is launched, compiled ahead of time, and chosen for a shape."""
