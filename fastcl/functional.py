"""The stateless forms of the losses, the statistics that they are made of, nearest rows, and Sinkhorn."""

from .losses.cluster import cluster_infonce
from .losses.sampled import sampled_similarity
from .neighbors import knn_predict, topk_similarity
from .sinkhorn import sinkhorn
from .statistics import contrastive_stats

__all__ = [
    "cluster_infonce",
    "contrastive_stats",
    "knn_predict",
    "sampled_similarity",
    "sinkhorn",
    "topk_similarity",
]
