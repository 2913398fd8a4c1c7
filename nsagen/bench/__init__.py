"""Benchmarks that users can rerun: `nsagen bench`.

Measuring here needs only torch and triton; plots need matplotlib.
"""
