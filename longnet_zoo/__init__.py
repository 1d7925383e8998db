"""Exact dilated attention (LongNet) and its model zoo on plain PyTorch."""

__version__ = "0.1.0"
