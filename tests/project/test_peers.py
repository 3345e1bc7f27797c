"""Agreement with the peers' own packages; a peer that is not installed is skipped."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from tests.losses.test_formulas_of_papers import weighted_dcl
from tests.losses.test_presets import agree, draw

PAIRS = torch.arange(7).repeat_interleave(2)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 3, 3, 1, 2])


def package(module: str) -> Any:
    """The module. A package with broken requirements counts as absent."""
    return pytest.importorskip(module, exc_type=ImportError)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_metric_learning_ntxent_of_one_positive(temperature, backend) -> None:
    losses = package("pytorch_metric_learning.losses")
    x = draw(14, 6)
    views = x.view(7, 2, 6)
    agree(
        fastcl.NTXentLoss(temperature)(views[:, 0], views[:, 1]),
        losses.NTXentLoss(temperature=temperature)(x, PAIRS),
        [x],
    )


@pytest.mark.parametrize("labels", [PAIRS, LABELS], ids=["one positive", "several"])
def test_metric_learning_supcon(labels, backend) -> None:
    losses = package("pytorch_metric_learning.losses")
    x = draw(14, 6)
    agree(fastcl.SupConLoss(0.1)(x, labels), losses.SupConLoss(temperature=0.1)(x, labels), [x])


def test_metric_learning_cross_batch_memory(backend) -> None:
    """Over several batches: a memory of labelled rows beside the batch itself."""
    losses = package("pytorch_metric_learning.losses")
    memory = losses.CrossBatchMemory(losses.SupConLoss(temperature=0.1), 6, memory_size=42).double()
    queue = fastcl.MemoryQueue(28, 6, dtype=torch.float64, clusters=True)
    loss = fastcl.ClusterInfoNCE(0.1)
    for seed in range(4):
        x = draw(14, 6, seed=seed)
        unit = torch.nn.functional.normalize(x, dim=1)
        expected = memory(unit, LABELS)
        clusters = {"contrast_clusters": LABELS, "ids": torch.arange(14), "contrast_ids": torch.arange(14)}
        # The memory holds a copy of the batch without gradient; ids keep a row from meeting itself.
        got = loss(x, LABELS, contrasts=[x.detach(), queue], **clusters)
        agree(got, expected, [x])
        queue.enqueue(x.detach(), LABELS)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_lightly_ntxent(temperature, backend) -> None:
    loss = package("lightly.loss")
    z0, z1 = draw(9, 5), draw(9, 5, seed=1)
    agree(fastcl.NTXentLoss(temperature)(z0, z1), loss.NTXentLoss(temperature)(z0, z1), [z0, z1])


def test_lightly_ntxent_with_a_memory_bank(backend) -> None:
    """MoCo, over more steps than the bank has room for."""
    loss = package("lightly.loss")
    peer = loss.NTXentLoss(0.2, memory_bank_size=(12, 5)).double()
    bank = getattr(peer, "memory_bank", peer).bank
    queue = fastcl.MemoryQueue(12, 5, dtype=torch.float64)
    queue.enqueue(bank if bank.shape == (12, 5) else bank.T)
    for step in range(5):
        query, key = draw(4, 5, seed=2 * step), draw(4, 5, seed=2 * step + 1).detach()
        agree(fastcl.MoCoLoss(0.2)(query, key, queue), peer(query, key), [query])
        queue.enqueue(key)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_lightly_dcl(temperature, backend) -> None:
    loss = package("lightly.loss")
    z0, z1 = draw(9, 5), draw(9, 5, seed=1)
    agree(fastcl.DCLLoss(temperature)(z0, z1), loss.DCLLoss(temperature)(z0, z1), [z0, z1])


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")  # of lightly's weights
def test_lightly_dclw(backend) -> None:
    dcl = package("lightly.loss.dcl_loss")
    z0, z1 = draw(9, 5), draw(9, 5, seed=1)
    peer = dcl.DCLLoss(0.1, weight_fn=dcl.negative_mises_fisher_weights)
    agree(weighted_dcl(z0, z1, 0.1, 0.5), peer(z0, z1), [z0, z1])
    agree(fastcl.DCLWLoss()(z0, z1), dcl.DCLWLoss()(z0, z1), [z0, z1])
    agree(fastcl.DCLWLoss(0.3, 0.2)(z0, z1), dcl.DCLWLoss(0.3, 0.2)(z0, z1), [z0, z1])


CLASS_LOSSES = {
    "ArcFaceLoss": [{}, {"margin": 60, "scale": 8}],
    "CosFaceLoss": [{}, {"margin": 0.1, "scale": 8}],
    "ProxyAnchorLoss": [{}, {"margin": 0.2, "alpha": 8}],
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_metric_learning_class_vectors(name, which, backend) -> None:
    """Parameters have the peer's names, so that its state loads."""
    losses = package("pytorch_metric_learning.losses")
    options, x = CLASS_LOSSES[name][which], draw(14, 6)
    peer = getattr(losses, name)(5, 6, **options).double()
    loss = getattr(fastcl, name)(5, 6, **options).double()
    loss.load_state_dict(peer.state_dict())
    results = []
    for one in (loss, peer):
        value = one(x, LABELS)
        results.append((value.detach(), *torch.autograd.grad(value, [x, *one.parameters()])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"alpha": 5, "beta": 20, "base": 0.1}], ids=["defaults", "others"])
@pytest.mark.parametrize("labels", [PAIRS, LABELS, torch.arange(14)], ids=["one positive", "several", "none"])
def test_metric_learning_multi_similarity(labels, options, backend) -> None:
    losses = package("pytorch_metric_learning.losses")
    x, y = draw(14, 6), draw(10, 6, seed=1)
    loss, peer = fastcl.MultiSimilarityLoss(**options), losses.MultiSimilarityLoss(**options)
    agree(loss(x, labels), peer(x, labels), [x])
    of = labels[:10]
    agree(loss(x, labels, y, of), peer(x, labels, ref_emb=y, ref_labels=of), [x, y])


@pytest.mark.parametrize("options", [{}, {"p": 1, "eps": 1e-6}], ids=["defaults", "others"])
def test_lightly_koleo(options, backend) -> None:
    """Theirs adds eps to each difference too, hence the tolerance of the second."""
    x, peer = draw(14, 6), package("lightly.loss.koleo_loss").KoLeoLoss(**options)
    values = (fastcl.KoLeoLoss(**options)(x), peer(x))
    results = [(value.detach(), *torch.autograd.grad(value, x)) for value in values]
    torch.testing.assert_close(*results, rtol=20 * options.get("eps", 1e-8), atol=20 * options.get("eps", 1e-8))


@pytest.mark.parametrize("options", [{}, {"t": 2.0, "lam": 0.5, "alpha": 1.0}], ids=["defaults", "others"])
def test_lightly_hypersphere(options, backend) -> None:
    x, y = draw(14, 6), draw(14, 6, seed=1)
    peer = package("lightly.loss.hypersphere_loss").HypersphereLoss(**options)
    agree(fastcl.HypersphereLoss(**options)(x, y), peer(x, y), [x, y])


@pytest.mark.parametrize("shape", [(14, 6), (6, 14)])
@pytest.mark.parametrize("name", ["VICRegLoss", "BarlowTwinsLoss", "NegativeCosineSimilarity"])
def test_lightly_without_negatives(name, shape) -> None:
    x, y = draw(*shape), draw(*shape, seed=1)
    agree(getattr(fastcl, name)()(x, y), getattr(package("lightly.loss"), name)()(x, y), [x, y])


@pytest.mark.parametrize("output_dict", [False, True])
def test_open_clip(output_dict, backend) -> None:
    peer = package("open_clip").ClipLoss()
    image, text = (torch.nn.functional.normalize(draw(9, 5, seed=seed), dim=1).detach() for seed in (0, 1))
    log_scale = torch.tensor(2.0, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (image, text, log_scale)]
    results = []
    for loss in (fastcl.ClipLoss(), peer):
        result = loss(image, text, logit_scale=log_scale.exp(), output_dict=output_dict)
        if output_dict:
            assert set(result) == {"contrastive_loss"}
            result = result["contrastive_loss"]
        results.append(result)
    assert isinstance(results[0], Tensor)
    agree(*results, leaves)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_metric_learning_ntxent_of_several_positives(temperature, backend) -> None:
    losses = package("pytorch_metric_learning.losses")
    x = draw(14, 6)
    loss = fastcl.ClusterInfoNCE(temperature, form="pairs")
    agree(loss(x, LABELS), losses.NTXentLoss(temperature=temperature)(x, LABELS), [x])


@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.3, 1.3)])
def test_metric_learning_contrastive(margins, backend) -> None:
    losses = package("pytorch_metric_learning.losses")
    x = draw(14, 6)
    expected = losses.ContrastiveLoss(pos_margin=margins[0], neg_margin=margins[1])(x, LABELS)
    agree(fastcl.PairContrastiveLoss(*margins)(x, LABELS), expected, [x])


def test_metric_learning_contrastive_of_cosines(backend) -> None:
    losses = package("pytorch_metric_learning.losses")
    distances = package("pytorch_metric_learning.distances")
    x = draw(14, 6)
    expected = losses.ContrastiveLoss(0.9, 0.1, distance=distances.CosineSimilarity())(x, LABELS)
    agree(fastcl.PairContrastiveLoss(0.9, 0.1, distance="cosine")(x, LABELS), expected, [x])


def test_open_clip_siglip(backend) -> None:
    loss = package("open_clip.loss").SigLipLoss()
    image, text = (torch.nn.functional.normalize(draw(14, 6, seed=seed)).detach().requires_grad_() for seed in (0, 1))
    scale, bias = (torch.tensor(value, dtype=image.dtype, requires_grad=True) for value in (9.0, -8.0))
    leaves = [image, text, scale, bias]
    agree(fastcl.SigLipLoss()(*leaves), loss(*leaves), leaves)
    found = fastcl.SigLipLoss()(*leaves, output_dict=True)
    agree(found["contrastive_loss"], loss(*leaves, output_dict=True)["contrastive_loss"], leaves)
