"""Benchmarks that users can rerun: `nsagen bench`, or `python -m nsagen.bench.<name>`.

Measuring here needs only torch and triton; plots need matplotlib.
"""
