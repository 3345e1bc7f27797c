"""PairContrastiveLoss against plain formulas."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl.functional import pair_contrastive_loss
from tests.support.backends import QUICK, running
from tests.support.strategies import generator
from tests.support.tolerances import accumulation_dtype, check

LABELS = (0, 1, 2, 0, 1, 2, 0, 1, 3, 3, 3, -1, 0, 2, -1, 1)
KINDS: dict[str, dict[str, Any]] = {
    "euclidean": {"pos_margin": 0.2, "neg_margin": 1.2},
    "defaults": {},
    "cosine": {"pos_margin": 0.8, "neg_margin": 0.1, "distance": "cosine"},
    "squared": {"pos_margin": 0.0, "neg_margin": 2.5, "squared": True},
}


def formula(
    x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None, *, pos_margin: float = 0.0,
    neg_margin: float = 1.0, distance: str = "euclidean", squared: bool = False, reduction: str = "active",
) -> Tensor:  # fmt: skip
    own = y is None
    y, y_labels = (x, labels) if y is None else (y, y_labels)
    if not squared:
        x, y = nn.functional.normalize(x), nn.functional.normalize(y)
    positive = (labels[:, None] == y_labels) & (labels[:, None] >= 0)
    negative = ~positive
    if own:
        positive, negative = (mask & ~torch.eye(len(x), dtype=torch.bool) for mask in (positive, negative))
    if distance == "cosine":
        t = -(x @ y.T)
        pos_margin, neg_margin = -pos_margin, -neg_margin
    else:
        square = (x[:, None] - y).square().sum(-1)
        t = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
    each = (t - pos_margin).relu(), (neg_margin - t).relu()
    each = tuple(part.square() / 2 for part in each) if squared else each
    losses = [torch.where(mask, part, 0) for mask, part in zip((positive, negative), each, strict=True)]
    if reduction == "none":
        return losses[0].sum(1) + losses[1].sum(1)
    if reduction == "sum":
        return losses[0].sum() + losses[1].sum()
    total = x.new_zeros(())
    for part, mask in zip(losses, (positive, negative), strict=True):
        count = (part > 0).sum() if reduction == "active" else mask.sum()
        total = total + part.sum() / count.clamp(min=1)
    return total


def draw(n: int, d: int, near: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    labels = torch.tensor(LABELS).repeat(-(-n // len(LABELS)))[:n]
    x = torch.randn(n, d, generator=g)
    if near:
        centres = torch.randn(4, d, generator=g)
        x = torch.where(labels[:, None] >= 0, centres[labels.clamp(min=0)] + near * x, x)
    return x.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["active", "mean", "sum", "none"])
@pytest.mark.parametrize("near", [0.0, 0.05])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_the_formula(kind, reduction, near, two, dtype) -> None:
    options = KINDS[kind] | {"reduction": reduction}
    x, labels = draw(37, 6, near, dtype)
    leaves = [x]
    others: dict[str, Tensor] = {}
    if two:
        y, y_labels = draw(45, 6, near, dtype, seed=1)
        leaves.append(y)
        others = {"contrasts": y, "contrast_labels": y_labels}

    def evaluate(at: torch.dtype, order: Tensor) -> tuple[Tensor, list[Tensor]]:
        inputs = [leaf.detach().to(at)[:, order].requires_grad_() for leaf in leaves]
        more = (inputs[1], y_labels) if two else ()
        loss = formula(inputs[0], labels, *more, **options)
        return loss.detach(), [g[:, order.argsort()] for g in torch.autograd.grad(loss.sum(), inputs)]

    truth, gradients = evaluate(torch.float64, torch.arange(6))
    eager = torch.float64 if dtype == torch.float64 else torch.float32
    draws = [evaluate(eager, order) for order in (torch.arange(6), torch.tensor([3, 1, 5, 0, 2, 4]))]
    for backend in QUICK:
        with running(backend):
            loss = pair_contrastive_loss(x, labels, **others, **options)
            found = torch.autograd.grad(loss.sum(), leaves)
        check(f"{backend} loss", loss, truth, [value for value, _ in draws], accumulation=accumulation_dtype(dtype))
        for k, got in enumerate(found):
            drawn = [grads[k] for _, grads in draws]
            half = dtype if dtype == torch.bfloat16 else None
            accumulation = accumulation_dtype(dtype)
            check(f"{backend} gradient {k}", got, gradients[k], drawn, accumulation=accumulation, half_rows=half)


def test_a_queue_with_clusters(backend) -> None:
    queue = fastcl.MemoryQueue(20, 5, clusters=True)
    stored, stored_labels = draw(17, 5, seed=3)
    queue.enqueue(stored.detach(), stored_labels)
    x, labels = draw(16, 5)
    found = fastcl.PairContrastiveLoss(neg_margin=1.3)(x, labels, contrasts=queue)
    expected = formula(x, labels, stored.detach(), stored_labels, neg_margin=1.3)
    torch.testing.assert_close(found, expected)


def test_nothing_counts(backend) -> None:
    x, labels = draw(1, 4)
    loss = fastcl.PairContrastiveLoss()(x, labels)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    assert fastcl.PairContrastiveLoss()(x[:0], labels[:0]).item() == 0
    assert fastcl.PairContrastiveLoss(neg_margin=-1.0)(*draw(8, 4)).isfinite()


def test_bad_rows_show(backend) -> None:
    x, labels = draw(16, 5)
    bad = x.detach().clone()
    bad[2, 1] = torch.nan
    for kind in KINDS.values():
        assert fastcl.PairContrastiveLoss(**kind)(bad, labels).isnan()


def test_module() -> None:
    loss = fastcl.PairContrastiveLoss(0.1, 1.5, reduction="sum")
    assert repr(loss) == (
        "PairContrastiveLoss(pos_margin=0.1, neg_margin=1.5, distance='euclidean', squared=False, reduction='sum')"
    )
    x, labels = draw(16, 5)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(x, labels), loss(x, labels))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels), loss(x, labels))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"pos_margin": float("nan")}, ValueError, "pos_margin: expected a finite number"),
        ({"neg_margin": float("inf")}, ValueError, "neg_margin: expected a finite number"),
        ({"neg_margin": torch.ones(())}, TypeError, "neg_margin: expected a number"),
        ({"distance": "manhattan"}, ValueError, "distance: expected one of"),
        ({"distance": "cosine", "squared": True}, ValueError, "squared: expected False with distance='cosine'"),
        ({"squared": 1}, TypeError, "squared: expected"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of"),
    ],
)
def test_bad_options(options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        fastcl.PairContrastiveLoss(**options)
    with pytest.raises(kind, match=message):
        pair_contrastive_loss(*draw(8, 4), **options)


def test_bad_input() -> None:
    x, labels = draw(8, 4)
    with pytest.raises((TypeError, ValueError), match="labels: expected"):
        fastcl.PairContrastiveLoss()(x, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels: expected"):
        fastcl.PairContrastiveLoss()(x, labels[:5])
    with pytest.raises(TypeError, match="labels: expected integers"):
        fastcl.PairContrastiveLoss()(x, labels.float())
    with pytest.raises(ValueError, match="contrast_labels: expected a tensor, as contrasts is one, got None"):
        fastcl.PairContrastiveLoss()(x, labels, contrasts=x.detach())
    with pytest.raises(ValueError, match="contrast_labels: expected None without contrasts"):
        fastcl.PairContrastiveLoss()(x, labels, contrast_labels=labels)


def test_bad_queues() -> None:
    x, labels = draw(8, 4)
    with pytest.raises(ValueError, match="contrasts: expected a queue or bank that stores clusters"):
        fastcl.PairContrastiveLoss()(x, labels, contrasts=fastcl.MemoryQueue(8, 4))
    queue = fastcl.MemoryQueue(8, 4, clusters=True)
    with pytest.raises(ValueError, match="contrast_labels: expected None, as a queue or bank brings its own"):
        fastcl.PairContrastiveLoss()(x, labels, contrasts=queue, contrast_labels=labels)
    with pytest.raises(TypeError, match="contrasts: expected"):
        fastcl.PairContrastiveLoss()(x, labels, contrasts=[x])  # type: ignore[arg-type]
