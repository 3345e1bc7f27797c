"""The study of Cl-InfoNCE's three comparisons (Tsai et al. 2022).

Clusters of auxiliary attributes against those of k-means and against none (instances); contrasting clusters against
predicting them by cross-entropy; and both against training on the labels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcl.train import Config, OptionError
from fastcl.train.study_tables import INFORMATION, PROBES, Entry, Study

DEFAULT = Config(epochs=20, batch_size=256, renew=4)
AUXILIARY, COUNTS = "attributes", (20, 10, 50)


def baselines(base: Config) -> list[Entry]:
    """What training is compared with, measured beside it."""
    options = {"method": "simclr", "long_tail": base.long_tail}
    return [Entry("", "raw pixels", options, "raw"), Entry("", "untrained encoder", options, "untrained")]


def comparison(auxiliary: str = AUXILIARY, counts: Sequence[int] = COUNTS) -> Study:
    """The study of contrasted and predicted clusters.

    auxiliary: as the trainer's --clusters. counts: of k-means; the first is compared, and has as many prototypes.
    """
    first, known = f"k-means {counts[0]}", Path(auxiliary).name  # of FILE.csv:COLUMN without the folders

    def entries(base: Config) -> list[Entry]:
        def entry(group: str, what: str, method: str, **options: Any) -> Entry:
            return Entry(group, what, {"method": method, "long_tail": base.long_tail, **options})

        kmeans = [(f"k-means {count}", {"clusters": "kmeans", "n_clusters": count}) for count in dict.fromkeys(counts)]
        sinkhorn = {"clusters": "sinkhorn", "n_clusters": counts[0]}
        return [
            *baselines(base),
            entry("contrastive", "instances (SimCLR)", "simclr"),
            *(entry("contrastive", what, "clinfonce", **options) for what, options in kmeans),
            entry("contrastive", f"Sinkhorn {counts[0]}", "clinfonce", **sinkhorn),
            entry("contrastive", known, "clinfonce", clusters=auxiliary),
            entry("cross-entropy", first, "cluster-ce", **kmeans[0][1]),
            entry("cross-entropy", known, "cluster-ce", clusters=auxiliary),
            entry("contrastive", "labels (SupCon)", "supcon"),
            entry("cross-entropy", "labels", "cluster-ce", clusters="labels"),
        ]

    kinds, losses, labels = "kinds of clusters", "contrasting against predicting", "against supervision"
    contrasted = ("contrastive", known)
    return Study(
        "Cl-InfoNCE's comparisons of clusters (attributes, k-means, Sinkhorn, none, labels) and of losses",
        entries,
        {**PROBES, **INFORMATION},
        (
            (kinds, contrasted, ("contrastive", first)),
            (kinds, contrasted, ("contrastive", "instances (SimCLR)")),
            (kinds, ("contrastive", first), ("contrastive", "instances (SimCLR)")),
            (kinds, ("contrastive", f"Sinkhorn {counts[0]}"), ("contrastive", first)),
            (losses, contrasted, ("cross-entropy", known)),
            (losses, ("contrastive", first), ("cross-entropy", first)),
            (labels, contrasted, ("contrastive", "labels (SupCon)")),
            (labels, contrasted, ("cross-entropy", "labels")),
        ),
        DEFAULT,
        whole=False,
    )


def check_auxiliary(auxiliary: str, data: str) -> None:
    """Raise where the clusters are no auxiliary ones of these images, before any is read."""
    from fastcl.train.data import check_clusters

    if auxiliary in ("kmeans", "tags", "labels", "sinkhorn"):
        raise OptionError(f"--auxiliary must be attributes or FILE.csv:COLUMN; got {auxiliary}")
    check_clusters(auxiliary, data)
