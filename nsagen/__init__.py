"""Generates, tunes and dispatches Triton kernels for Native Sparse Attention."""

__version__ = "0.1.0"
