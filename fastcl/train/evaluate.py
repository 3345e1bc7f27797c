"""What a representation is worth: probes on held-out images, and how its clusters relate to the labels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fastcl import knn_predict, rankme, sinkhorn
from fastcl.train.data import ImageData, as_float
from fastcl.train.methods.clusterings import kmeans, nearest
from fastcl.train.methods.prototypes import PrototypeMethod

NEIGHBOURS = 10
DRAWS = 10  # of the few labelled images, for the probes with 1 and 5 labels a class

Labels = NDArray[np.int64]
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Representation:
    """Rows ``[n, D]`` of the training and of the held-out images, float32."""

    train: Rows
    test: Rows


def embed(encoder: nn.Module, images: Tensor, device: torch.device, batch: int = 512) -> Rows:
    """Features float32 ``[n, D]`` of un-augmented images ``[n, C, H, W]``."""
    encoder.eval()
    with torch.no_grad():
        parts = [encoder(as_float(part.to(device))).float().cpu() for part in images.split(batch)]
    return torch.cat(parts).numpy()


def represent(encoder: nn.Module, images: ImageData, device: torch.device) -> Representation:
    """Both sets of images through the encoder."""
    return Representation(*(embed(encoder, part, device) for part in (images.train_images, images.test_images)))


def scores(method: PrototypeMethod, images: Tensor, device: torch.device) -> Tensor:
    """Cosine similarities ``[n, K]`` of un-augmented images ``[n, C, H, W]`` with the prototypes."""
    rows = torch.from_numpy(embed(method.encoder, images, device)).to(device)
    method.eval()
    with torch.no_grad():
        return method.scores(method.projector(rows))


def assigned(method: PrototypeMethod, images: Tensor, device: torch.device) -> Labels:
    """The nearest prototype ``[n]`` of un-augmented images ``[n, C, H, W]``."""
    nearest: Labels = scores(method, images, device).argmax(1).cpu().numpy()
    return nearest


def prototype_use(cosines: Tensor, masses: Tensor, batch: int, temperature: float) -> dict[str, float]:
    """How a prior, the masses ``[K]``, rules prototypes, from cosines ``[n, K]`` of all training images.

    ``share``: prototypes whose mass of a batch is an image or more; ``assigned``: those that are the largest in an
    image's assignment, Sinkhorn's with the prior; ``nearest``: those that are the nearest of an image. ``variation``:
    the total variation between the prior and the mean prediction, the softmax of cosines over the temperature;
    ``lead``: by how much the best cosine is above the second, on average.
    """
    best = cosines.topk(2, dim=1).values
    mean = (cosines / temperature).softmax(1).mean(0)
    return {
        "share": int((batch * masses > 1 - 1e-4).sum()),  # of an image, but for the rounding of masses
        "assigned": len(sinkhorn(cosines, prior=masses).assignments.argmax(1).unique()),
        "nearest": len(cosines.argmax(1).unique()),
        "variation": float(0.5 * (mean - masses).abs().sum()),
        "lead": float((best[:, 0] - best[:, 1]).mean()),
    }


def knn_accuracy(rows: Representation, images: ImageData) -> float:
    """Share of held-out images whose ten nearest training images (cosine), the nearer the weightier, vote for their
    label."""
    train, test = torch.from_numpy(rows.train), torch.from_numpy(rows.test)
    votes = knn_predict(test, train, torch.from_numpy(images.train_labels), min(NEIGHBOURS, len(train)))
    return float((votes.argmax(1).numpy() == images.test_labels).mean())


def linear_accuracy(rows: Representation, images: ImageData, labels_per_class: int | None, seed: int) -> float:
    """Held-out accuracy of a logistic regression on standardised rows: see :func:`linear_hits`."""
    return float(linear_hits(rows, images, labels_per_class, seed).mean())


def linear_hits(
    rows: Representation, images: ImageData, labels_per_class: int | None, seed: int
) -> NDArray[np.float64]:
    """How often ``[n]`` each held-out image's label is found by a logistic regression on standardised rows.

    Fitted to all training labels (None), or to that many a class, averaged over ten draws by ``seed``: the same draws
    for every representation. Mean and spread come from all training rows, as they need no label.
    """
    scaler = StandardScaler().fit(rows.train)
    train, test = scaler.transform(rows.train), scaler.transform(rows.test)
    hits = []
    for draw in range(DRAWS if labels_per_class else 1):
        chosen: Any = slice(None)
        if labels_per_class:
            order = np.random.default_rng([seed, draw]).permutation(len(train))
            chosen = np.concatenate(
                [order[images.train_labels[order] == label][:labels_per_class] for label in range(len(images.classes))]
            )
        classifier = LogisticRegression(max_iter=2000).fit(train[chosen], images.train_labels[chosen])
        hits.append(classifier.predict(test) == images.test_labels)
    mean: NDArray[np.float64] = np.mean(hits, axis=0)
    return mean


def _entropy(counts: NDArray[Any]) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def cluster_information(labels: Labels, clusters: Labels) -> tuple[float, float]:
    """I(label; cluster) and H(cluster | label) in nats: plug-in estimates from labels ``[n]`` and clusters ``[n]``.

    An image without a cluster (negative) is a cluster of its own, as it is in the loss.
    """
    lone = clusters < 0
    own = np.where(lone, clusters.max(initial=-1) + np.cumsum(lone), clusters)
    joint = np.unique(np.stack([labels, own]), axis=1, return_counts=True)[1]
    h_label, h_cluster = (_entropy(np.unique(ids, return_counts=True)[1]) for ids in (labels, own))
    h_joint = _entropy(joint)
    # Clamped, because sums that are equal on paper may differ in the last bit.
    return max(h_label + h_cluster - h_joint, 0.0), max(h_joint - h_label, 0.0)


def probe(rows: Representation, images: ImageData, n_clusters: int, seed: int) -> tuple[dict[str, float], Labels]:
    """Every probe of one representation, by name, and the k-means clusters ``[n]`` of its held-out rows.

    The k-means of ``n_clusters`` is fitted to the training rows.
    """
    clusters = nearest(rows.test, kmeans(rows.train, n_clusters, seed))
    information, entropy = cluster_information(images.test_labels, clusters)
    return {
        "knn": knn_accuracy(rows, images),
        "linear_1": linear_accuracy(rows, images, 1, seed),
        "linear_5": linear_accuracy(rows, images, 5, seed),
        "linear_all": linear_accuracy(rows, images, None, seed),
        "mutual_information": information,
        "conditional_entropy": entropy,
        "rankme": float(rankme(torch.from_numpy(rows.test))),
    }, clusters


def raw_pixels(images: ImageData) -> Representation:
    """The images themselves as rows ``[n, C * H * W]``."""
    return Representation(*(as_float(part).flatten(1).numpy() for part in (images.train_images, images.test_images)))
