"""The arguments of the command line, by what they are for. `--help` answers at once: nothing heavy is imported."""
