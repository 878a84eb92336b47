"""What `export` is made of: capture, the deploy pipeline, and what the manifest says."""
