"""Time per training step, side by side in one run: `python -m benchmarks`."""
