"""Fused losses for contrastive and clustering self-supervised learning in PyTorch."""

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
