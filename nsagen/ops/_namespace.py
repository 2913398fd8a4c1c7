"""Where PyTorch finds the custom ops: `torch.ops.<NAMESPACE>`.

Each exported package has its own, so that it runs beside nsagen and beside other exports.
"""

NAMESPACE = "nsagen"
