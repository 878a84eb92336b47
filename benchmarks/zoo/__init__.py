"""Models that use their weights in every way we know of; data for the tests and for `docs/sites.md`, never shipped."""
