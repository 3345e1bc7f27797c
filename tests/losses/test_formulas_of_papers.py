"""Each row of docs/losses.md's table of papers against the paper's formula.

SimCLR, L_out of SupCon, CLIP, DCL and MoCo are in `test_presets`, the debiased losses in `test_debiased`, the sampled
ones in `test_sampled`, soft assignments in `test_cluster_assignments`.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import fastcl
from fastcl import ClusterInfoNCE, MemoryBank, MemoryQueue
from tests.losses.test_presets import agree, draw

DOCS = Path(__file__).parents[2] / "docs"
LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return normalize(x, dim=1) @ normalize(y, dim=1).T


def test_ntxent_with_an_additive_margin(backend) -> None:
    """Lepage and Dehak 2023: the positive's cosine minus m, in numerator and denominator."""
    z = draw(6, 2, 5)
    rows = z.transpose(0, 1).flatten(0, 1)  # first views, then second ones
    partner = torch.arange(12).roll(6)
    s = cosines(rows, rows).fill_diagonal_(-torch.inf)
    s = (s - 0.2 * nn.functional.one_hot(partner, 12)) / 0.1
    agree(ClusterInfoNCE(0.1, margin=0.2)(z), cross_entropy(s, partner), [z])


def test_supcon_inside(backend) -> None:
    """Khosla et al. 2020, equation 3."""
    z = draw(8, 5)
    s = (cosines(z, z) / 0.1).fill_diagonal_(-torch.inf).softmax(1)
    positive = (LABELS[:, None] == LABELS) & ~torch.eye(8, dtype=torch.bool)
    agree(ClusterInfoNCE(0.1, form="inside")(z, LABELS), -((s * positive).sum(1) / positive.sum(1)).log().mean(), [z])


def test_cluster_infonce_across_views(backend) -> None:
    """Tsai et al. 2022: y drawn from the anchor's cluster against all y, in expectation over the draws."""
    z0, z1 = draw(8, 5), draw(8, 5, seed=1)
    same = (LABELS[:, None] == LABELS).double()
    draws = same / same.sum(1, keepdim=True)

    def one_way(x: Tensor, y: Tensor) -> Tensor:
        return -(draws * (cosines(x, y) / 0.1).log_softmax(1)).sum(1).mean()

    agree(ClusterInfoNCE(0.1)(z0, LABELS, contrasts=z1), one_way(z0, z1), [z0, z1])
    both = ClusterInfoNCE(0.1, symmetric=True)(z0, LABELS, contrasts=z1)
    agree(both, (one_way(z0, z1) + one_way(z1, z0)) / 2, [z0, z1])


def test_infonce(backend) -> None:
    """Oord et al. 2018: a cross-entropy with row i of the other set as the target."""
    z0, z1 = draw(8, 5), draw(8, 5, seed=1)
    agree(ClusterInfoNCE(0.1)(z0, contrasts=z1), cross_entropy(cosines(z0, z1) / 0.1, torch.arange(8)), [z0, z1])


def test_clip_with_a_learned_temperature(backend) -> None:
    image, text = draw(8, 5), draw(8, 5, seed=1)
    loss = ClusterInfoNCE(nn.Parameter(torch.tensor(0.07, dtype=torch.float64)), symmetric=True)
    s = cosines(image, text) / loss.temperature
    expected = (cross_entropy(s, torch.arange(8)) + cross_entropy(s.T, torch.arange(8))) / 2
    agree(loss(image, contrasts=text), expected, [image, text, loss.temperature])


def test_cross_batch_memory(backend) -> None:
    """Wang et al. 2020: all labelled rows of the last batches, here in SupCon's form."""
    z, stored, of_stored = draw(8, 5), draw(12, 5, seed=1).detach(), torch.arange(12) % 3
    queue = MemoryQueue(12, 5, dtype=torch.float64, clusters=True)
    queue.enqueue(stored, of_stored)
    positive = (LABELS[:, None] == of_stored).double()
    log_p = (cosines(z, stored) / 0.1).log_softmax(1)
    agree(ClusterInfoNCE(0.1)(z, LABELS, contrasts=queue), -((log_p * positive).sum(1) / positive.sum(1)).mean(), [z])


def test_instance_discrimination(backend) -> None:
    """Wu et al. 2018: a softmax over all images, whose weights are the bank's rows."""
    z, indices = draw(4, 5), torch.tensor([3, 0, 7, 5])
    bank = MemoryBank(9, 5, dtype=torch.float64)
    bank.update(torch.arange(9), draw(9, 5, seed=1).detach())
    agree(
        ClusterInfoNCE(0.1)(z, indices, contrasts=bank), cross_entropy(cosines(z, bank.embeddings) / 0.1, indices), [z]
    )


def test_pirl() -> None:
    """Misra and van der Maaten 2020: image and pretext version against the image's row."""
    f, g, indices = draw(4, 5), draw(4, 5, seed=1), torch.tensor([3, 0, 7, 5])
    bank = MemoryBank(9, 5, dtype=torch.float64)
    bank.update(torch.arange(9), draw(9, 5, seed=2).detach())
    negatives = torch.tensor([[1, 2, 8], [1, 1, 4], [0, 2, 3], [6, 7, 8]])

    def term(x: Tensor) -> Tensor:
        chosen = bank.embeddings[torch.cat([indices[:, None], negatives], 1)]
        s = torch.einsum("nd,nkd->nk", normalize(x, dim=1), chosen) / 0.07
        e = s.exp()
        h = e / (e + e[:, 1:].sum(1, keepdim=True))
        return (-h[:, 0].log() - (1 - h[:, 1:]).log().sum(1)).mean()

    loss = fastcl.SampledNCELoss(0.07, form="pirl")
    got = 0.5 * loss(g, indices, bank, negatives=negatives) + 0.5 * loss(f, indices, bank, negatives=negatives)
    agree(got, 0.5 * term(g) + 0.5 * term(f), [f, g])


def test_deepcluster_v2(backend) -> None:
    """Caron et al. 2020: the clusters of last epoch's rows, and their centroids as the classes' vectors."""
    z, index, stored = draw(6, 5), torch.tensor([3, 0, 7, 5, 5, 8]), draw(9, 5, seed=1).detach()
    found = fastcl.kmeans(stored, 3, spherical=True, init=stored[:3])
    logits = cosines(z, found.centroids) / 0.1
    loss = ClusterInfoNCE(0.1)(
        z, found.assignments[index], contrasts=found.centroids, contrast_clusters=torch.arange(3)
    )  # fmt: skip
    agree(loss, cross_entropy(logits, found.assignments[index]), [z])


def test_nnclr(backend) -> None:
    """Dwibedi et al. 2021: the nearest stored row of a view replaces the view."""
    z0, p1 = draw(6, 5).detach(), draw(6, 5, seed=1)
    stored = normalize(draw(10, 5, seed=2).detach(), dim=1)
    queue = MemoryQueue(10, 5, dtype=torch.float64)
    queue.enqueue(stored)
    nearest = stored[cosines(z0, stored).argmax(1)]
    expected = cross_entropy(nearest @ normalize(p1, dim=1).T / 0.1, torch.arange(6))
    agree(ClusterInfoNCE(0.1)(queue.nearest(z0), contrasts=p1), expected, [p1])


def test_sampled_softmax_with_log_q_correction(backend) -> None:
    """Yi et al. 2019: items are sampled in proportion to their popularity, and logits are corrected for it."""
    query, items = draw(8, 5), draw(8, 5, seed=1)
    log_q = torch.linspace(-4, -1, 8, dtype=torch.float64)
    got = ClusterInfoNCE(0.1)(query, contrasts=items, contrast_bias=-log_q)
    agree(got, cross_entropy(cosines(query, items) / 0.1 - log_q, torch.arange(8)), [query, items])


def test_logit_adjustment(backend) -> None:
    """Menon et al. 2021: a softmax over classes, plus the logarithm of each class's frequency."""
    z, prototypes = draw(8, 5), draw(3, 5, seed=1)
    log_prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    got = ClusterInfoNCE(0.1)(
        z, LABELS, contrasts=prototypes, contrast_clusters=torch.arange(3), contrast_bias=log_prior
    )
    agree(got, cross_entropy(cosines(z, prototypes) / 0.1 + log_prior, LABELS), [z, prototypes])


def test_alignment_and_uniformity(backend) -> None:
    """Wang and Isola 2020, as they wrote it."""
    x, y = draw(8, 5), draw(8, 5, seed=1)
    u, v = normalize(x, dim=1), normalize(y, dim=1)

    def lunif(rows: Tensor) -> Tensor:
        return torch.pdist(rows).pow(2).mul(-2).exp().mean().log()

    expected = (u - v).norm(dim=1).pow(2).mean() + (lunif(u) + lunif(v)) / 2
    got = fastcl.alignment(x, y) + (fastcl.uniformity(x) + fastcl.uniformity(y)) / 2
    agree(got, expected, [x, y])


def weighted_dcl(z0: Tensor, z1: Tensor, temperature: float, sigma: float) -> Tensor:
    """The code on the documentation's page."""
    page = (DOCS / "own_loss.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "sigma" in block)
    made = {"z0": z0, "z1": z1, "temperature": temperature, "sigma": sigma}
    code = re.sub(r"^(z0, z1|temperature, sigma) = .*$|^loss.backward\(\)$", "", code, flags=re.MULTILINE)
    exec(code, made)
    loss: Tensor = made["loss"]
    return loss


def test_map_loss_of_the_documentation() -> None:
    """A contrastive loss on cosines: means over the positives below one margin and the negatives above another."""
    page = (DOCS / "own_loss.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "hinge_pos" in block)
    made: dict[str, Tensor] = {}
    torch.manual_seed(0)
    exec(code, made)
    z = made["z"].detach().double().requires_grad_()
    s, other = cosines(z, z), ~torch.eye(256, dtype=torch.bool)
    same = made["labels"][:, None] == made["labels"]
    near, far = (0.8 - s)[same & other].clamp(min=0), (s - 0.3)[~same].clamp(min=0)
    expected = near.sum() / (near > 0).sum() + far.sum() / (far > 0).sum()
    torch.testing.assert_close((made["pull"] + made["push"]).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(made["z"].grad.double(), torch.autograd.grad(expected, z)[0], rtol=1e-3, atol=1e-6)


def test_weighted_decoupled_loss(backend) -> None:
    """Yeh et al. 2022, equation 7: the positives' weights follow a von Mises-Fisher distribution."""
    z0, z1 = draw(7, 5), draw(7, 5, seed=1)

    def one_view(x: Tensor, y: Tensor) -> Tensor:
        positive = (normalize(x, dim=1) * normalize(y, dim=1)).sum(1)
        weight = 2 - (positive / 0.5).exp() / (positive / 0.5).exp().mean()
        own = torch.eye(7, dtype=torch.bool)
        s = torch.cat([cosines(x, x).masked_fill(own, -torch.inf), cosines(x, y).masked_fill(own, -torch.inf)], 1)
        return (-weight.detach() * positive / 0.1 + (s / 0.1).logsumexp(1)).mean()

    agree(weighted_dcl(z0, z1, 0.1, 0.5), (one_view(z0, z1) + one_view(z1, z0)) / 2, [z0, z1])
