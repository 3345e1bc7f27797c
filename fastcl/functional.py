"""The stateless forms of the losses, the statistics that they are made of, nearest rows, and Sinkhorn."""

from .losses.cluster import cluster_infonce
from .losses.pair_contrastive import pair_contrastive_loss
from .losses.sampled import sampled_similarity
from .losses.sigmoid import sigmoid_loss
from .neighbors import knn_predict, topk_similarity
from .sinkhorn import sinkhorn
from .statistics import contrastive_stats

__all__ = [
    "cluster_infonce",
    "contrastive_stats",
    "knn_predict",
    "pair_contrastive_loss",
    "sampled_similarity",
    "sigmoid_loss",
    "sinkhorn",
    "topk_similarity",
]
