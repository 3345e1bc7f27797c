"""Contrastive losses for PyTorch that never store the matrix of logits."""

__version__ = "0.1.0"

import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import distributed, functional, metric_learning
from .cached import CachedStep, cached_step
from .clustering import KMeansResult, cluster_concentrations, kmeans
from .guide import Guide
from .losses.ascl import ASCLLoss
from .losses.cluster import ClusterInfoNCE
from .losses.debiased import DebiasedLoss, HardNegativeLoss
from .losses.decoupled import DCLWLoss
from .losses.distillation import CapiLoss, DINOLoss, IBOTLoss
from .losses.gist import GISTEmbedLoss
from .losses.matryoshka import MatryoshkaLoss
from .losses.metric import ArcFaceLoss, CosFaceLoss, MultiSimilarityLoss, ProxyAnchorLoss
from .losses.pair_contrastive import PairContrastiveLoss
from .losses.presets import ClipLoss, DCLLoss, MoCoLoss, NTXentLoss, SupConLoss
from .losses.prototype_cross_entropy import prototype_cross_entropy
from .losses.prototypes import MSNLoss, PMSNLoss, SwAVLoss
from .losses.prototypical import ProtoNCELoss
from .losses.redundancy import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss, WMSELoss
from .losses.regularisers import HypersphereLoss, KoLeoLoss, LDRegLoss
from .losses.sampled import SampledNCELoss, sampled_similarity
from .losses.scan import SCANLoss
from .losses.sigmoid import SigLipLoss, SigmoidLoss
from .losses.summary import LossStats
from .memory import MemoryBank, MemoryQueue
from .neighbors import knn_predict, topk_similarity
from .ops.backends.choose import use_backend
from .quality import alignment, rankme, uniformity
from .sinkhorn import (
    SinkhornResult,
    power_law_prior,
    prior_from_counts,
    sinkhorn,
    sinkhorn_potentials,
    uniform_prior,
)
from .statistics import contrastive_stats
from .swept import ContrastiveStats

__all__ = [
    "ASCLLoss",
    "ArcFaceLoss",
    "BarlowTwinsLoss",
    "CachedStep",
    "CapiLoss",
    "ClipLoss",
    "ClusterInfoNCE",
    "ContrastiveStats",
    "CosFaceLoss",
    "DCLLoss",
    "DCLWLoss",
    "DINOLoss",
    "DebiasedLoss",
    "GISTEmbedLoss",
    "Guide",
    "HardNegativeLoss",
    "HypersphereLoss",
    "IBOTLoss",
    "KMeansResult",
    "KoLeoLoss",
    "LDRegLoss",
    "LossStats",
    "MSNLoss",
    "MatryoshkaLoss",
    "MemoryBank",
    "MemoryQueue",
    "MoCoLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "PMSNLoss",
    "PairContrastiveLoss",
    "ProtoNCELoss",
    "ProxyAnchorLoss",
    "SCANLoss",
    "SampledNCELoss",
    "SigLipLoss",
    "SigmoidLoss",
    "SinkhornResult",
    "SupConLoss",
    "SwAVLoss",
    "VICRegLoss",
    "WMSELoss",
    "alignment",
    "cached_step",
    "cluster_concentrations",
    "contrastive_stats",
    "distributed",
    "functional",
    "kmeans",
    "knn_predict",
    "metric_learning",
    "power_law_prior",
    "prior_from_counts",
    "prototype_cross_entropy",
    "rankme",
    "sampled_similarity",
    "sinkhorn",
    "sinkhorn_potentials",
    "topk_similarity",
    "uniform_prior",
    "uniformity",
    "use_backend",
]

if not _TYPE_CHECKING:  # a type checker would then accept every name

    def __getattr__(name: str) -> object:
        """Says what a name of another library is called here."""
        renamed = {
            "SwaVLoss": "SwAVLoss",
            "ContrastiveLoss": "PairContrastiveLoss, or metric_learning.ContrastiveLoss",
            "CrossBatchMemory": "MemoryQueue",
            "MemoryBankModule": "MemoryQueue",
            "NNMemoryBankModule": "MemoryQueue, with its method nearest",
            "MultipleNegativesRankingLoss": "ClusterInfoNCE(1 / scale)(queries, contrasts=documents)",
        }
        message = f"module 'fastcl' has no attribute {name!r}"
        if name in renamed:
            message = f"{message}: it is called {renamed[name]} here"
            # `from fastcl import SwaVLoss` would replace the text of an AttributeError.
            if _sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap":
                raise ImportError(message, name="fastcl")
        raise AttributeError(message)
