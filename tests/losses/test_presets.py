"""The presets against their peers' published formulas, written out here as the peers wrote them."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import fastcl
from tests.support.strategies import generator


def peers_ntxent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """SimCLR: cross-entropy over the 2 N - 1 other rows, target the other view."""
    z = normalize(torch.cat([z0, z1]), dim=1)
    n = len(z0)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return cross_entropy(logits, torch.arange(2 * n).roll(n))


def peers_supcon(features: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """SupContrast's code with contrast_mode "all", base_temperature equal to temperature."""
    n, views = features.shape[:2]
    features = normalize(features, dim=2)
    mask = torch.eye(n) if labels is None else (labels[:, None] == labels[None, :]).float()
    contrast = torch.cat(features.unbind(1))
    logits = contrast @ contrast.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    mask = mask.repeat(views, views)
    others = 1 - torch.eye(n * views)
    mask = mask * others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def peers_clip(image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
    """open_clip's ClipLoss on one process."""
    logits = scale * image @ text.T
    target = torch.arange(len(image))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def peers_dcl(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """Decoupled contrastive learning: the positive is not in the denominator, negatives come from both views."""
    z0, z1 = normalize(z0, dim=1), normalize(z1, dim=1)
    n = len(z0)

    def one_view(a, b):
        positive = (a * b).sum(1) / temperature
        own = torch.eye(n, dtype=torch.bool)
        negatives = torch.cat([(a @ a.T).masked_fill(own, -torch.inf), (a @ b.T).masked_fill(own, -torch.inf)], 1)
        return (-positive + (negatives / temperature).logsumexp(1)).mean()

    return (one_view(z0, z1) + one_view(z1, z0)) / 2


def peers_moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    query, key, queue = (normalize(t, dim=1) for t in (query, key, queue))
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype).requires_grad_()


def agree(got: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected)
    mine, theirs = torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(mine, theirs)
    assert all(gradient.abs().sum() > 0 for gradient in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 7, 33])
def test_ntxent(n, dtype, backend) -> None:
    z0, z1 = draw(n, 5, dtype=dtype), draw(n, 5, seed=1, dtype=dtype)
    agree(fastcl.NTXentLoss()(z0, z1), peers_ntxent(z0, z1, 0.5), [z0, z1])
    agree(fastcl.NTXentLoss(temperature=0.1)(z0, z1), peers_ntxent(z0, z1, 0.1), [z0, z1])
    agree(fastcl.NTXentLoss(0.2)(z0, z1), peers_ntxent(z0, z1, 0.2), [z0, z1])


def test_ntxent_of_a_single_pair(backend) -> None:
    """There is no negative: the loss is 0."""
    z0, z1 = draw(1, 5), draw(1, 5, seed=1)
    loss = fastcl.NTXentLoss()(z0, z1)
    assert loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcon(views, backend) -> None:
    features = draw(12, views, 5)
    labels = torch.arange(12) // 3
    agree(fastcl.SupConLoss()(features, labels), peers_supcon(features, labels, 0.07), [features])
    agree(fastcl.SupConLoss(temperature=0.3)(features, labels), peers_supcon(features, labels, 0.3), [features])
    if views == 1:
        flat = features[:, 0]
        agree(fastcl.SupConLoss()(flat, labels), peers_supcon(features, labels, 0.07), [features])
    else:
        agree(fastcl.SupConLoss()(features), peers_supcon(features, None, 0.07), [features])


def test_supcon_leaves_out_anchors_without_positives(backend) -> None:
    """The mean is over the other anchors. SupContrast's released code gives NaN."""
    features = draw(5, 1, 4)
    loss = fastcl.SupConLoss()(features[:, 0], torch.tensor([0, 0, 1, 1, 2]))
    z = normalize(features[:, 0], dim=1)
    s = (z @ z.T / 0.07).fill_diagonal_(-torch.inf)
    expected = (s.logsumexp(1)[:4] - s[torch.arange(4), torch.tensor([1, 0, 3, 2])]).mean()
    agree(loss, expected, [features])


def test_supcon_without_labels_needs_views() -> None:
    with pytest.raises(ValueError, match=r"clusters|labels"):
        fastcl.SupConLoss()(draw(5, 4))


@pytest.mark.parametrize("normalized", [False, True])
def test_clip(normalized, backend) -> None:
    """Rows are not normalised, whatever their norm."""
    image, text = draw(9, 5), draw(9, 5, seed=1)
    if normalized:
        image, text = (normalize(t.detach(), dim=1).requires_grad_() for t in (image, text))
    agree(fastcl.ClipLoss()(image, text, 3.0), peers_clip(image, text, 3.0), [image, text])
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    agree(fastcl.ClipLoss()(image, text, scale), peers_clip(image, text, scale), [image, text, scale])
    log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    got = fastcl.ClipLoss()(image, text, log_scale.exp())
    agree(got, peers_clip(image, text, log_scale.exp()), [image, text, log_scale])


@pytest.mark.parametrize("n", [2, 7, 33])
def test_dcl(n, backend) -> None:
    z0, z1 = draw(n, 5), draw(n, 5, seed=1)
    agree(fastcl.DCLLoss()(z0, z1), peers_dcl(z0, z1, 0.1), [z0, z1])
    agree(fastcl.DCLLoss(temperature=0.5)(z0, z1), peers_dcl(z0, z1, 0.5), [z0, z1])


@pytest.mark.parametrize("size", [1, 20])
def test_moco(size, backend) -> None:
    query, key = draw(6, 5), draw(6, 5, seed=1)
    queue = draw(size, 5, seed=2).detach()
    agree(fastcl.MoCoLoss()(query, key, queue), peers_moco(query, key, queue, 0.07), [query, key])
    agree(fastcl.MoCoLoss(temperature=0.2)(query, key, queue), peers_moco(query, key, queue, 0.2), [query, key])


def test_moco_with_a_detached_key(backend) -> None:
    query, key, queue = draw(6, 5), draw(6, 5, seed=1).detach(), draw(9, 5, seed=2).detach()
    fastcl.MoCoLoss()(query, key, queue).backward()
    assert query.grad.abs().sum() > 0
    assert key.grad is None


def test_moco_with_an_empty_queue(backend) -> None:
    query, key = draw(6, 5), draw(6, 5, seed=1)
    loss = fastcl.MoCoLoss()(query, key, torch.empty(0, 5, dtype=torch.float64))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    gradients = torch.autograd.grad(loss, [query, key])
    torch.testing.assert_close(gradients, (torch.zeros(6, 5).double(), torch.zeros(6, 5).double()))


@pytest.mark.parametrize(
    ("preset", "temperature"),
    [(fastcl.NTXentLoss, 0.5), (fastcl.SupConLoss, 0.07), (fastcl.DCLLoss, 0.1), (fastcl.MoCoLoss, 0.07)],
)
def test_temperature(preset, temperature) -> None:
    """The default is the published one and is in the repr; a parameter is learned."""
    assert f"temperature={temperature}" in repr(preset())
    module = preset(temperature=nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    inputs = {
        fastcl.SupConLoss: (draw(4, 2, 3),),
        fastcl.MoCoLoss: (draw(4, 3), draw(4, 3, seed=1), draw(5, 3, seed=2)),
    }.get(preset, (draw(4, 3), draw(4, 3, seed=1)))
    module(*inputs).backward()
    assert module.temperature.grad.abs() > 0


def test_shapes_that_do_not_match() -> None:
    z = draw(4, 3)
    for call, name in (
        (lambda: fastcl.NTXentLoss()(z, z[:3]), "z1"),
        (lambda: fastcl.NTXentLoss()(z, z[:, :2]), "z1"),
        (lambda: fastcl.NTXentLoss()(z[0], z[0]), "z0"),
        (lambda: fastcl.DCLLoss()(z, z[:3]), "z1"),
        (lambda: fastcl.ClipLoss()(z, z[:3], 1.0), "text"),
        (lambda: fastcl.ClipLoss()(z, z[:, :2], 1.0), "text"),
        (lambda: fastcl.ClipLoss()(z, z, -1.0), "logit_scale"),
        (lambda: fastcl.ClipLoss()(z, z, "1"), "logit_scale"),
        (lambda: fastcl.MoCoLoss()(z, z[:3], z), "^key: expected"),
        (lambda: fastcl.MoCoLoss()(z, z, z[:, :2]), "queue"),
        (lambda: fastcl.ClipLoss()(z, z, 1.0, None, "yes"), "^output_dict: expected"),
        (lambda: fastcl.SupConLoss()([1]), "^features: expected"),
        (lambda: fastcl.SupConLoss()(z), "^labels: expected"),
        (lambda: fastcl.SupConLoss()(z, torch.ones(len(z))), "^labels: expected"),
        (lambda: fastcl.MoCoLoss(symmetric=True), "symmetric"),
        (lambda: fastcl.NTXentLoss(symmetric=True), "symmetric"),
        (lambda: fastcl.MoCoLoss()(z, z, z[0]), "queue"),
        (lambda: fastcl.SupConLoss()(z, torch.arange(3)), "^labels: expected"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            call()


def test_contrast_mode_one_of_supcontrast_as_documented() -> None:
    """First views are the anchors; all rows but the anchor's own are the contrasts."""
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(8, 2, 16, generator=g), torch.randint(0, 4, (8,), generator=g)
    rows = torch.nn.functional.normalize(features.double(), dim=2).flatten(0, 1)
    logits = rows[::2] @ rows.T / 0.07
    own = torch.arange(16) == 2 * torch.arange(8)[:, None]
    positive = (labels[:, None] == labels.repeat_interleave(2)) & ~own
    log_prob = logits - logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    expected = -(log_prob.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "ids=torch.arange(8),\n    contrast_ids=one" in block
    )
    made = {"features": features, "labels": labels}
    exec(re.sub(r"^features, labels = .*$", "", code, flags=re.MULTILINE), made)
    torch.testing.assert_close(made["loss"].double(), expected, rtol=1e-5, atol=0)


class Unread:
    """A value that raises if it is read."""

    def __getattribute__(self, name: str) -> None:
        raise AssertionError(f"{name} was read")


def test_clip_warns_once_of_a_bias_that_it_does_not_read() -> None:
    image, text = draw(5, 3), draw(5, 3, seed=1)
    loss = fastcl.ClipLoss()
    with pytest.warns(UserWarning, match=r"^logit_bias: .*cancels in both softmaxes.*sigmoid") as warned:
        got = loss(image, text, 3.0, Unread())
    assert warned[0].filename == __file__
    assert torch.equal(got, loss(image, text, 3.0))
    assert torch.equal(got, loss(image, text, 3.0, torch.tensor(-10.0)))  # where a warning would be an error
    with pytest.warns(UserWarning, match=r"^logit_bias: "):
        fastcl.ClipLoss()(image, text, 3.0, logit_bias=-10.0)


def test_clip_is_silent_of_a_bias_while_compiling() -> None:
    image, text = draw(5, 3), draw(5, 3, seed=1)
    compiled = torch.compile(fastcl.ClipLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, text, 3.0, -10.0), fastcl.ClipLoss()(image, text, 3.0))
