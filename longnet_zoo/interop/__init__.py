"""Bridges to code that people have: Hugging Face Transformers and torchscale."""
