"""Where the figures on speed come from; `python -m benchmarks` runs all and writes docs/results/benchmarks.md."""
