"""Contrastive losses for PyTorch that never store the matrix of logits."""

__version__ = "0.1.0"

from . import functional
from .infonce import ClipLoss, ClusterInfoNCE, DCLLoss, MoCoLoss, NTXentLoss, SupConLoss
from .kernels.ops import use_backend
from .kernels.stats import ContrastiveStats, contrastive_stats

__all__ = [
    "ClipLoss",
    "ClusterInfoNCE",
    "ContrastiveStats",
    "DCLLoss",
    "MoCoLoss",
    "NTXentLoss",
    "SupConLoss",
    "contrastive_stats",
    "functional",
    "use_backend",
]
