"""What `save` and `load` are made of: hostile files, keys resolved to sites, plans checked before anything changes."""
