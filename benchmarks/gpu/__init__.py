"""What `benchmarks/gpu.sh` runs: sections, each a process of its own, so that one which fails takes no other along."""
