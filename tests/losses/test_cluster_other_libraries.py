"""What docs/migration.md says of masks, UniCL, MIL-NCE, unusual labels and features, and second derivatives."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import ClusterInfoNCE, contrastive_stats
from tests.losses.test_formulas_of_papers import cosines
from tests.losses.test_presets import agree, draw

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def block(word: str) -> str:
    found = [text for text in blocks() if word in text]
    assert len(found) == 1
    return found[0]


def test_a_mask_that_is_no_equivalence(backend) -> None:
    """SupContrast's formula with `mask=`, of any 0 and 1: not symmetric, not transitive."""
    x = draw(8, 5)
    off = ~torch.eye(8, dtype=torch.bool)
    mask = (torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.4).double() * off
    assert (mask != mask.T).any()
    log_prob = (cosines(x, x) / 0.1).masked_fill(~off, -torch.inf).log_softmax(1).masked_fill(~off, 0)
    counts = mask.sum(1)
    expected = -((mask * log_prob).sum(1) / counts.clamp(min=1))[counts > 0].mean()
    ids, names = torch.arange(8), torch.eye(8, dtype=torch.float64)
    loss = ClusterInfoNCE(0.1)(x, contrasts=x, assignments=mask, contrast_assignments=names, ids=ids, contrast_ids=ids)
    agree(loss, expected, [x])


def test_the_mask_of_the_page() -> None:
    torch.manual_seed(0)
    scope: dict = {}
    exec(block("mask.fill_diagonal_"), scope)
    x, mask = scope["x"], scope["mask"]
    s = (cosines(x, x) / 0.07).fill_diagonal_(-torch.inf).log_softmax(1).fill_diagonal_(0)
    counts = mask.sum(1)
    expected = -((mask * s).sum(1) / counts.clamp(min=1))[counts > 0].mean()
    torch.testing.assert_close(scope["loss"], expected)


def test_unicl(backend) -> None:
    """Yang et al. 2022: soft targets over the texts of the same label, in both directions."""
    image, text = draw(8, 5), draw(8, 5, seed=1)
    same = (LABELS[:, None] == LABELS).double()
    logits = cosines(image, text) / 0.1
    expected = sum(-(same / same.sum(1, keepdim=True) * s.log_softmax(1)).sum(1).mean() for s in (logits, logits.T))
    loss = ClusterInfoNCE(0.1, symmetric=True)(image, LABELS, contrasts=text, contrast_clusters=LABELS)
    agree(loss, expected / 2, [image, text])


def test_mil_nce(backend) -> None:
    """Miech et al. 2020, as their code has it: the denominator holds the texts of a clip in both directions."""
    videos, texts = draw(6, 5), draw(24, 5, seed=1)
    clips = torch.arange(6)
    scope: dict = {"videos": videos, "texts": texts, "torch": torch, "contrastive_stats": contrastive_stats}
    lines = block("others = s.reverse").splitlines()
    exec("\n".join(line for line in lines if not line.startswith(("import", "from", "videos"))), scope)
    x = (videos @ texts.T).view(6, 6, 4)
    own = x[clips, clips].logsumexp(1)
    both = torch.cat([x, x.transpose(0, 1)], dim=1).reshape(6, -1).logsumexp(1)
    agree(scope["loss"], (both - own).mean(), [videos, texts])


def test_labels_and_features_that_are_refused() -> None:
    z = torch.randn(6, 2, 3, 4)
    labels = torch.arange(6) // 2
    for loss in (fastcl.SupConLoss(), ClusterInfoNCE()):
        rows = z.flatten(2)
        for wrong, kind in ((labels > 0, TypeError), (labels.float(), TypeError), (labels[:, None], ValueError)):
            with pytest.raises(kind, match=r"^(labels|clusters): expected"):
                loss(rows, wrong)
        with pytest.raises(ValueError, match=r"^(features|embeddings): expected shape"):
            loss(z, labels)
        assert torch.equal(loss(rows, labels[:, None].flatten()), loss(rows, labels.float().long()))


def test_second_derivatives_raise(backend) -> None:
    x = draw(8, 5)
    gradient = torch.autograd.grad(ClusterInfoNCE(0.1)(x, LABELS), x, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_negative_labels_leave_a_class_out() -> None:
    x, labels = draw(16, 8), torch.tensor([-1, 1]).repeat(8)
    each = ClusterInfoNCE(0.1, reduction="none")(x, labels + 1)
    torch.testing.assert_close(fastcl.SupConLoss(0.1)(x, labels), each[labels == 1].mean())
    shifted: Tensor = fastcl.SupConLoss(0.1)(x, labels - labels.min())
    torch.testing.assert_close(shifted, each.mean())


def test_the_exponent_of_pmsn() -> None:
    anchors, targets, prototypes = draw(8, 5), draw(8, 5, seed=1).detach(), draw(7, 5, seed=2)
    prior = partial(fastcl.power_law_prior, exponent=0.25)
    one, other = (loss(anchors, targets, prototypes) for loss in (fastcl.PMSNLoss(prior=prior), fastcl.PMSNLoss()))
    assert torch.equal(one, other)
    steep = fastcl.PMSNLoss(prior=partial(fastcl.power_law_prior, exponent=1.5))
    assert not torch.equal(steep(anchors, targets, prototypes), other)
