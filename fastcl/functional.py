"""The stateless forms of the losses, the statistics that they are made of, nearest rows, and Sinkhorn."""

from .losses.ascl import ascl_loss
from .losses.cluster import cluster_infonce
from .losses.decoupled import dclw_loss
from .losses.distillation import capi_loss, dino_loss, ibot_loss
from .losses.gist import gist_embed_loss
from .losses.metric import arcface_loss, cosface_loss, multi_similarity_loss, proxy_anchor_loss
from .losses.pair_contrastive import pair_contrastive_loss
from .losses.prototype_cross_entropy import prototype_cross_entropy
from .losses.prototypical import proto_nce_loss
from .losses.redundancy import barlow_twins_loss, negative_cosine_similarity, vicreg_loss, wmse_loss
from .losses.regularisers import hypersphere_loss, koleo_loss, ldreg_loss
from .losses.sampled import sampled_similarity
from .losses.scan import scan_loss
from .losses.sigmoid import sigmoid_loss
from .neighbors import knn_predict, topk_similarity
from .sinkhorn import sinkhorn, sinkhorn_potentials
from .statistics import contrastive_stats

__all__ = [
    "arcface_loss",
    "ascl_loss",
    "barlow_twins_loss",
    "capi_loss",
    "cluster_infonce",
    "contrastive_stats",
    "cosface_loss",
    "dclw_loss",
    "dino_loss",
    "gist_embed_loss",
    "hypersphere_loss",
    "ibot_loss",
    "knn_predict",
    "koleo_loss",
    "ldreg_loss",
    "multi_similarity_loss",
    "negative_cosine_similarity",
    "pair_contrastive_loss",
    "proto_nce_loss",
    "prototype_cross_entropy",
    "proxy_anchor_loss",
    "sampled_similarity",
    "scan_loss",
    "sigmoid_loss",
    "sinkhorn",
    "sinkhorn_potentials",
    "topk_similarity",
    "vicreg_loss",
    "wmse_loss",
]
