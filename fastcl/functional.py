"""The stateless forms of the losses, the statistics that they are made of, and Sinkhorn."""

from .infonce import cluster_infonce
from .kernels.stats import contrastive_stats
from .sinkhorn import sinkhorn

__all__ = ["cluster_infonce", "contrastive_stats", "sinkhorn"]
