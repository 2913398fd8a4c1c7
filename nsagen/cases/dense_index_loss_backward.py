"""Example calls of the index loss over all earlier tokens, backward."""

from nsagen.cases.index_loss_backward import make_case

__all__ = ["make_case"]
