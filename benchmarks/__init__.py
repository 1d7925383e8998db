"""What is measured, each file a programme: `python -m benchmarks.NAME`."""
