"""The accelerated residual stream of M2R2 (arXiv 2502.02040): adapters, exit, training."""
