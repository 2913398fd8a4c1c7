"""Benchmarks that users can run again: `nsagen bench`, or `python -m nsagen.bench.<name>`.

Nothing here needs more than torch and triton to measure; plots need matplotlib.
"""
