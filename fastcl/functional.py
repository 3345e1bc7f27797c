"""The stateless forms of the losses, the statistics that they are made of, nearest rows, and Sinkhorn."""

from .infonce import cluster_infonce
from .kernels.stats import contrastive_stats
from .memory import knn_predict, topk_similarity
from .sampled import sampled_similarity
from .sinkhorn import sinkhorn

__all__ = [
    "cluster_infonce",
    "contrastive_stats",
    "knn_predict",
    "sampled_similarity",
    "sinkhorn",
    "topk_similarity",
]
