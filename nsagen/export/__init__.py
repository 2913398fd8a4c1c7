"""`nsagen export`: a spec's kernels as a package that stands alone. Text only; imports no torch."""
