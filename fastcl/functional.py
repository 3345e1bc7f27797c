"""The stateless forms of the losses, and the statistics that they are made of."""

from .infonce import cluster_infonce
from .kernels.stats import contrastive_stats

__all__ = ["cluster_infonce", "contrastive_stats"]
