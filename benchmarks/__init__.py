"""One command per claim. Each writes benchmarks/<name>.md with the command, the commit and the machine."""
