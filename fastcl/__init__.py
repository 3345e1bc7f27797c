"""Contrastive losses for PyTorch that never store the matrix of logits."""

__version__ = "0.1.0"

from . import functional
from .infonce import ClipLoss, ClusterInfoNCE, DCLLoss, MoCoLoss, NTXentLoss, SupConLoss
from .kernels.ops import ContrastiveStats, contrastive_stats, use_backend

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
