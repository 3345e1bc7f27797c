"""Contrastive losses for PyTorch that never store the matrix of logits."""

__version__ = "0.1.0"

from . import distributed, functional
from .debiased import DebiasedLoss, HardNegativeLoss
from .infonce import ClipLoss, ClusterInfoNCE, DCLLoss, MoCoLoss, NTXentLoss, SupConLoss
from .kernels.ops import use_backend
from .kernels.stats import ContrastiveStats, contrastive_stats
from .memory import MemoryBank, MemoryQueue, knn_predict, topk_similarity
from .prototypes import MSNLoss, PMSNLoss, SwAVLoss
from .quality import alignment, uniformity
from .sampled import SampledNCELoss, sampled_similarity
from .sinkhorn import SinkhornResult, power_law_prior, prior_from_counts, sinkhorn, uniform_prior
from .summary import LossStats

__all__ = [
    "ClipLoss",
    "ClusterInfoNCE",
    "ContrastiveStats",
    "DCLLoss",
    "DebiasedLoss",
    "HardNegativeLoss",
    "LossStats",
    "MSNLoss",
    "MemoryBank",
    "MemoryQueue",
    "MoCoLoss",
    "NTXentLoss",
    "PMSNLoss",
    "SampledNCELoss",
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
    "sampled_similarity",
    "sinkhorn",
    "topk_similarity",
    "uniform_prior",
    "uniformity",
    "use_backend",
]
