"""Example calls of the index loss over all earlier tokens, forward."""

from nsagen.cases.index_loss import make_case

__all__ = ["make_case"]
