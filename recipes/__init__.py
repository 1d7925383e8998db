"""Training programmes: one Lightning task a file, run as `python -m recipes.NAME`."""
