"""Losses on class vectors, pairs and prototypes written plainly, with dense masks and logits, and their judge."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pairwise_distance

from tests.support.judging import objective
from tests.support.oracle import CONSTANT_NORMS, TRUTH, Evaluation, differentiate, eager_evaluations, similarities
from tests.support.strategies import generator
from tests.support.tolerances import accumulation_dtype, check


def log1p_sum(s: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum of exp(s) over the mask) of each row."""
    s = torch.cat([torch.where(mask, s, -torch.inf), s.new_zeros(len(s), 1)], 1)
    return s.logsumexp(1)


def reduce(terms: Tensor, reduction: str, count: Tensor | int | None = None) -> Tensor:
    if reduction == "none":
        return terms
    return terms.sum() / ((len(terms) if count is None else count) if reduction == "mean" else 1)


def cosines(x: Tensor, y: Tensor, how: Evaluation) -> Tensor:
    return similarities(x.to(how.dtype), y.to(how.dtype), 1.0, True, True, how)


def arcface(embeddings, labels, prototypes, *, margin=28.6, scale=64.0, reduction="mean", how=TRUTH) -> Tensor:
    s, own = cosines(embeddings, prototypes, how), one_hot(labels.long(), len(prototypes)).bool()
    m, angle = math.radians(margin), s[own].clamp(-1, 1).acos()
    target = torch.where(angle <= math.pi - m, (angle + m).cos(), angle.cos() - m * math.sin(m))
    return reduce(log1p_sum(scale * (s - target[:, None]), ~own), reduction)


def cosface(embeddings, labels, prototypes, *, margin=0.35, scale=64.0, reduction="mean", how=TRUTH) -> Tensor:
    s, own = cosines(embeddings, prototypes, how), one_hot(labels.long(), len(prototypes)).bool()
    return reduce(log1p_sum(scale * (s - s[own][:, None] + margin), ~own), reduction)


def proxy_anchor(embeddings, labels, prototypes, *, margin=0.1, alpha=32.0, reduction="mean", how=TRUTH) -> Tensor:
    s, own = cosines(prototypes, embeddings, how), one_hot(labels.long(), len(prototypes)).bool().T
    pull, push = log1p_sum(-alpha * (s - margin), own), log1p_sum(alpha * (s + margin), ~own)
    if reduction == "mean":
        return pull.sum() / own.any(1).sum() + push.sum() / len(prototypes)
    return reduce(pull + push, reduction)


def multi_similarity(
    embeddings, labels, contrasts=None, contrast_labels=None, *,
    alpha=2.0, beta=50.0, base=0.5, reduction="mean", how=TRUTH,
) -> Tensor:  # fmt: skip
    others, of = (embeddings, labels) if contrasts is None else (contrasts, contrast_labels)
    s, same = cosines(embeddings, others, how), (labels[:, None] == of) & (labels[:, None] >= 0)
    admissible = ~torch.eye(len(s), dtype=torch.bool) if contrasts is None else torch.ones_like(same)
    pull, push = log1p_sum(-alpha * (s - base), same & admissible), log1p_sum(beta * (s - base), ~same & admissible)
    return reduce(pull / alpha + push / beta, reduction)


def koleo(embeddings, *, p=2.0, eps=1e-8, reduction="mean", how=TRUTH) -> Tensor:
    x = embeddings.to(how.dtype)
    norms = x.norm(dim=1, keepdim=True)
    unit = x / (norms.detach() if how.part else norms)
    nearest = cosines(embeddings.detach(), embeddings.detach(), how).fill_diagonal_(-2).argmax(1)
    return reduce(-(pairwise_distance(unit, unit[nearest], p, 0) + eps).log(), reduction)


def ldreg(embeddings, *, k=64, reduction="mean", how=TRUTH) -> Tensor:
    distances = (
        torch.cdist(embeddings, embeddings.detach(), compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, 1:]
    )
    k = min(k, len(embeddings) - 1)
    middle = distances[:, : k - 1].mean(1)
    return reduce(-(middle / (distances[:, k - 1] - middle)).log().abs(), reduction)


def hypersphere(z_a, z_b, *, t=1.0, lam=1.0, alpha=2.0, how=TRUTH) -> Tensor:
    def uniform(z: Tensor) -> Tensor:
        other = ~torch.eye(len(z), dtype=torch.bool)
        return (-t * (2 - 2 * cosines(z, z, how)[other])).logsumexp(0) - math.log(other.sum())

    norms = [z.to(how.dtype).norm(dim=1, keepdim=True) for z in (z_a, z_b)]
    units = [z / (norm.detach() if how.part else norm) for z, norm in zip((z_a, z_b), norms, strict=True)]
    aligned = (units[0] - units[1]).square().sum(1) ** (alpha / 2)
    return aligned.mean() + lam * (uniform(z_a) + uniform(z_b)) / 2


def dclw(z0, z1, *, temperature=0.1, sigma=0.5, reduction="mean", how=TRUTH) -> Tensor:
    z, n = torch.cat((z0, z1)), len(z0)
    s, sample = cosines(z, z, how), torch.arange(n).repeat(2)
    negative = sample[:, None] != sample
    own = s.gather(1, torch.arange(2 * n).roll(n)[:, None])[:, 0]
    weight = 2 - n * (own.detach().view(2, n) / sigma).softmax(1).flatten()
    terms = torch.where(negative, s / temperature, -torch.inf).logsumexp(1) - weight * own / temperature
    return reduce(terms.view(2, n).T if reduction == "none" else terms, reduction)


def proto_nce(
    embeddings, clusters, prototypes, concentrations, *, negatives=None, reduction="mean", how=TRUTH
) -> Tensor:
    k, clustered = len(prototypes), clusters >= 0
    s = cosines(embeddings, prototypes, how) / concentrations.to(how.dtype)
    own = (clusters[:, None] == torch.arange(k)) & clustered[:, None]
    taken = own.any(0) if negatives is not None else torch.ones(k, dtype=torch.bool)
    if negatives is not None:
        taken[negatives.long()] = True
    target = torch.where(own, s, 0).sum(1, keepdim=True)
    terms = torch.where(clustered, log1p_sum(s - target, taken & ~own), 0)
    return reduce(terms, reduction, clustered.sum().clamp(min=1))


def judge(
    plain: Callable[..., Tensor], loss: Callable[..., Tensor], arguments: dict[str, Any], leaves: tuple[str, ...]
) -> None:
    """Value and gradients of a loss against its plain float64 formula, by the error rule."""
    dtypes = [arguments[name].dtype for name in leaves]
    accumulation, product = accumulation_dtype(*dtypes), dtypes[0]
    for dtype in dtypes[1:]:
        product = torch.promote_types(product, dtype)

    def evaluate(how: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        return differentiate(plain, arguments, leaves, objective, how.dtype, how=how)

    truth, true_gradients = evaluate(TRUTH)
    unprojected = evaluate(CONSTANT_NORMS)[1]
    draws = [evaluate(how) for how in eager_evaluations(accumulation)]
    got, gradients = differentiate(loss, arguments, leaves, objective)
    assert got.dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)
    check("loss", got, truth, [value for value, _ in draws], accumulation=accumulation)
    for name, value in true_gradients.items():
        assert value.any()
        check(
            f"gradient of {name}", gradients[name], value, [found[name] for _, found in draws],
            accumulation=accumulation, half_rows=product, magnitude=unprojected[name],
        )  # fmt: skip


def class_rows(
    kind: str, dtype: torch.dtype, n: int = 17, classes: int = 7, d: int = 9, seed: int = 0
) -> dict[str, Tensor]:
    """Embeddings, labels (one class has no embedding), class vectors; converged: embeddings lie near their class's."""
    g = generator(seed)
    prototypes = torch.randn(classes, d, generator=g, dtype=torch.float64)
    labels = torch.randint(0, classes - 1, (n,), generator=g)
    rows = torch.randn(n, d, generator=g, dtype=torch.float64)
    if kind == "converged":
        rows = prototypes[labels] + 0.05 * rows
    return {"embeddings": rows.to(dtype), "labels": labels, "prototypes": prototypes.to(dtype)}


def two_views(kind: str, dtype: torch.dtype, n: int = 13, d: int = 9) -> tuple[Tensor, Tensor]:
    g = generator(1)
    first, second = torch.randn(2, n, d, generator=g, dtype=torch.float64).unbind(0)
    return first.to(dtype), (first + 0.05 * second if kind == "converged" else second).to(dtype)
