"""Contrastive losses for PyTorch that never store the matrix of logits."""

__version__ = "0.1.0"

from . import distributed, functional
from .losses.cluster import ClusterInfoNCE
from .losses.debiased import DebiasedLoss, HardNegativeLoss
from .losses.decoupled import DCLWLoss
from .losses.distillation import CapiLoss, DINOLoss, IBOTLoss
from .losses.metric import ArcFaceLoss, CosFaceLoss, MultiSimilarityLoss, ProxyAnchorLoss
from .losses.pair_contrastive import PairContrastiveLoss
from .losses.presets import ClipLoss, DCLLoss, MoCoLoss, NTXentLoss, SupConLoss
from .losses.prototype_cross_entropy import prototype_cross_entropy
from .losses.prototypes import MSNLoss, PMSNLoss, SwAVLoss
from .losses.prototypical import ProtoNCELoss
from .losses.regularisers import HypersphereLoss, KoLeoLoss
from .losses.sampled import SampledNCELoss, sampled_similarity
from .losses.sigmoid import SigLipLoss, SigmoidLoss
from .losses.summary import LossStats
from .memory import MemoryBank, MemoryQueue
from .neighbors import knn_predict, topk_similarity
from .ops.backends.choose import use_backend
from .quality import alignment, uniformity
from .sinkhorn import (
    SinkhornResult,
    power_law_prior,
    prior_from_counts,
    sinkhorn,
    sinkhorn_potentials,
    uniform_prior,
)
from .statistics import ContrastiveStats, contrastive_stats

__all__ = [
    "ArcFaceLoss",
    "CapiLoss",
    "ClipLoss",
    "ClusterInfoNCE",
    "ContrastiveStats",
    "CosFaceLoss",
    "DCLLoss",
    "DCLWLoss",
    "DINOLoss",
    "DebiasedLoss",
    "HardNegativeLoss",
    "HypersphereLoss",
    "IBOTLoss",
    "KoLeoLoss",
    "LossStats",
    "MSNLoss",
    "MemoryBank",
    "MemoryQueue",
    "MoCoLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "PMSNLoss",
    "PairContrastiveLoss",
    "ProtoNCELoss",
    "ProxyAnchorLoss",
    "SampledNCELoss",
    "SigLipLoss",
    "SigmoidLoss",
    "SinkhornResult",
    "SupConLoss",
    "SwAVLoss",
    "alignment",
    "contrastive_stats",
    "distributed",
    "functional",
    "knn_predict",
    "power_law_prior",
    "prior_from_counts",
    "prototype_cross_entropy",
    "sampled_similarity",
    "sinkhorn",
    "sinkhorn_potentials",
    "topk_similarity",
    "uniform_prior",
    "uniformity",
    "use_backend",
]
