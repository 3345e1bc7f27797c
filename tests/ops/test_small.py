"""The direct paths of small calls on a CPU: which calls they take, and what torch and users may do around them.

Values and gradients: `test_direct.py` compares them with the formula, and the tests of the losses with the oracle.
"""

import threading
import warnings
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fastcl
from fastcl.functional import cluster_infonce, pair_contrastive_loss, sigmoid_loss
from fastcl.ops import small
from fastcl.ops.backends import choose, native
from tests.support.strategies import generator

pytestmark = pytest.mark.skipif("cpu" not in choose.AVAILABLE, reason="no native engine")

LOSSES = {
    "infonce": (partial(cluster_infonce, temperature=0.3), "SmallMean"),
    "decoupled": (partial(cluster_infonce, temperature=0.3, denominator="negatives"), "SmallMean"),
    "pairs": (partial(cluster_infonce, temperature=0.3, form="pairs"), "SmallPairMean"),
    "pairs, margin": (partial(cluster_infonce, temperature=0.3, form="pairs", margin=0.2), "SmallPairMean"),
    "sigmoid": (partial(sigmoid_loss, temperature=0.3, bias=-2.0), "SmallTotal"),
    "sigmoid, sum": (partial(sigmoid_loss, temperature=0.3, bias=-2.0, reduction="sum"), "SmallTotal"),
}
N, M, D = 9, 12, 5
# The same with labels, and with two sweeps.
MEANS = {
    "contrastive": pair_contrastive_loss,
    "cosine": partial(pair_contrastive_loss, distance="cosine", pos_margin=0.9, neg_margin=0.1),
    "squared": partial(pair_contrastive_loss, squared=True, pos_margin=2.0, neg_margin=3.0),
    "all pairs": partial(pair_contrastive_loss, reduction="mean", neg_margin=1.2),
}
ALL = {**LOSSES, **{name: (loss, "SmallMeans") for name, loss in MEANS.items()}}


def x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype).requires_grad_()


def labels(*dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 3]).to(*dtype)


def loners() -> Tensor:
    """Rows 5 and 6 are in no cluster, although their numbers are equal."""
    return torch.tensor([0, 0, 1, 1, 1, -7, -7, -1, 3])


CASES = {
    "labels": lambda: (x(N, D), {"clusters": labels()}),
    "no cluster": lambda: (x(N, D), {"clusters": loners()}),
    "int32 labels": lambda: (x(N, D), {"clusters": labels(torch.int32)}),
    "strided labels": lambda: (x(N, D), {"clusters": labels().repeat_interleave(2)[::2]}),
    "strided rows": lambda: (x(D, 2 * N).detach().T[::2].requires_grad_(), {"clusters": labels()}),
    "double": lambda: (x(N, D, dtype=torch.float64), {"clusters": labels()}),
    "half": lambda: (x(N, D, dtype=torch.bfloat16), {"clusters": labels()}),
    "views": lambda: (x(N, 3, D), {}),
    "views with labels": lambda: (x(N, 2, D), {"clusters": labels()}),
    "one number": lambda: (x(N, 1), {"clusters": labels()}),
    "two sets": lambda: (x(N, D), {"contrasts": x(N, D, seed=1)}),
    "more contrasts": lambda: (x(N, D), {"contrasts": x(M, D, seed=1)}),
    "views and contrasts": lambda: (x(3, 2, D), {"contrasts": x(M, D, seed=1)}),
    "labelled contrasts": lambda: (
        x(N, D),
        {"clusters": labels(), "contrasts": x(M, D, seed=1), "contrast_clusters": torch.arange(-2, M - 2) // 2},
    ),
    "labels for contrasts too": lambda: (x(N, D), {"clusters": labels(), "contrasts": x(M, D, seed=1)}),
    "two dtypes": lambda: (x(N, D), {"contrasts": x(N, D, dtype=torch.float16, seed=1)}),
    "raw rows": lambda: (x(N, D), {"clusters": labels(), "normalize": False}),
}


def off(monkeypatch) -> None:
    monkeypatch.setattr(small, "MOST", 0)


def name_of(loss: Tensor) -> str:
    assert loss.grad_fn is not None
    return loss.grad_fn.name()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("learned", ["number", "parameter", "exact parameter", "vector", "half"])
def test_results_are_those_of_the_usual_way(case: str, name: str, learned: str, monkeypatch) -> None:
    loss, node = LOSSES[name]
    z, options = CASES[case]()
    leaves = [z, *(v for v in options.values() if isinstance(v, Tensor) and v.requires_grad)]
    if learned != "number":
        dtype = {"exact parameter": torch.float64, "half": torch.bfloat16}.get(learned, torch.float32)
        temperature = Parameter(torch.full((1,) if learned == "vector" else (), 0.37, dtype=dtype))
        options["temperature"] = temperature
        leaves.append(temperature)
        if node == "SmallTotal":
            options["bias"] = Parameter(torch.full((), -1.5, dtype=dtype))
            leaves.append(options["bias"])
    got = loss(z, **options)
    assert name_of(got) == f"{node}Backward"
    with torch.no_grad():
        assert torch.equal(loss(z, **options), got)
    gradients = torch.autograd.grad(got * -2.5, leaves)
    off(monkeypatch)
    usual = loss(z, **options)
    assert node not in name_of(usual)
    assert got.dtype == usual.dtype
    torch.testing.assert_close(got, usual, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(usual * -2.5, leaves), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        slack = 2.0**-7 if a.dtype.itemsize == 2 else 3e-6
        torch.testing.assert_close(a, b, rtol=0, atol=slack * max(1e-3, b.abs().max().item()))


ONE_SET = ("labels", "no cluster", "double", "views", "raw rows")
TWO_SETS = ("two sets", "more contrasts", "labelled contrasts")


@pytest.mark.parametrize(("case", "symmetric"), [*product(ONE_SET, [False]), *product(TWO_SETS, [False, True])])
@pytest.mark.parametrize("name", ["infonce", "decoupled"])
def test_hard_negatives_are_those_of_the_usual_way(case: str, name: str, symmetric: bool, monkeypatch) -> None:
    loss, node = LOSSES[name]
    z, options = CASES[case]()
    hard = x(*z.shape[:-1], 3, D, dtype=z.dtype, seed=2)
    with torch.no_grad():  # of a row of zeros, of equal rows, and far above the other logits
        hard[0, ..., 0, :] = 0
        hard[1] = z[1, ..., None, :]
        hard[2] *= 1 if options.get("normalize", True) else 30
    options.update(hard_negatives=hard, symmetric=symmetric, temperature=Parameter(torch.tensor(0.37, dtype=z.dtype)))
    leaves = [z, *(v for v in options.values() if isinstance(v, Tensor) and v.requires_grad)]
    got = loss(z, **options)
    assert name_of(got) == f"{node}Backward"
    gradients = torch.autograd.grad(got * -2.5, leaves, retain_graph=True)
    for first, second in zip(gradients, torch.autograd.grad(got * -2.5, leaves), strict=True):
        assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(loss(z, **options), got)
        assert loss(z, **{**options, "hard_negatives": hard.index_fill(0, torch.tensor(3), torch.inf)}).isnan()
    off(monkeypatch)
    usual = loss(z, **options)
    assert node not in name_of(usual)
    torch.testing.assert_close(got, usual, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(usual * -2.5, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * max(1e-3, b.abs().max().item()))


@pytest.mark.parametrize("name", ["infonce", "decoupled"])
@pytest.mark.parametrize("size", [1.0, 3e4, 1e6])
def test_hard_negatives_far_above_the_other_logits(name: str, size: float, monkeypatch) -> None:
    """The last row has no positive, and does not count."""
    loss, _ = LOSSES[name]
    z, hard = x(N, D), x(N, 3, D, seed=2)
    with torch.no_grad():
        z *= size
        hard *= 3 * size
    call = partial(loss, z, labels(), hard_negatives=hard, normalize=False, temperature=0.7)
    got = call()
    gradients = torch.autograd.grad(got, (z, hard))
    off(monkeypatch)
    usual = call()
    torch.testing.assert_close(got, usual, rtol=1e-5, atol=0)
    for a, b in zip(gradients, torch.autograd.grad(usual, (z, hard)), strict=True):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
    assert not gradients[1][-1].any()


def test_saved_rows_that_a_hook_moves_are_read_as_they_are() -> None:
    """A second backward reads them."""
    loss, _ = LOSSES["infonce"]
    z, hard = x(N, D), x(N, 3, D, seed=2)
    expected = torch.autograd.grad(loss(z, labels(), hard_negatives=hard), (z, hard))

    def turned(values: Tensor) -> Tensor:
        return values.movedim(0, -1).contiguous().movedim(-1, 0)

    with torch.autograd.graph.saved_tensors_hooks(lambda values: values, turned):
        found = loss(z, labels(), hard_negatives=hard)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(found, (z, hard), retain_graph=True), expected, strict=True):
            assert torch.equal(a, b)


def test_a_pair_counts_however_far_below_the_negatives_are() -> None:
    """With the log-sum-exp of negatives below what stands for no negatives."""
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    contrasts = torch.tensor([[-2e30, 0.0], [-2e31, 0.0]])
    loss, node = LOSSES["pairs"]
    found = loss(
        query, torch.tensor([0]), contrasts=contrasts, contrast_clusters=torch.tensor([0, 1]), temperature=1.0,
        normalize=False,
    )  # fmt: skip
    assert node in name_of(found)
    assert found.item() < 1e-30
    assert torch.autograd.grad(found, query)[0].abs().max() < 1


def test_unusual_hard_negatives_take_the_usual_way() -> None:
    z, hard = x(N, D), x(N, 3, D, seed=2)
    loss, node = LOSSES["infonce"]
    expected = loss(z, labels(), hard_negatives=hard)
    assert node in name_of(expected)
    strided = hard.detach().transpose(0, 1).contiguous().transpose(0, 1)
    for given in (strided, hard.detach().double(), hard[:, :0]):
        assert node not in name_of(loss(z, labels(), hard_negatives=given))
    torch.testing.assert_close(loss(z, labels(), hard_negatives=strided), expected)
    views = x(N, 2, D)
    assert node not in name_of(loss(views, labels(), hard_negatives=hard))  # of all views
    with_statistics, _ = loss(z, labels(), hard_negatives=hard, return_stats=True)
    assert torch.equal(with_statistics, expected)
    narrow = torch.randn(1, N, 3).permute(1, 2, 0)  # contiguous, with an odd stride
    with_copy = loss(z[:, :1], labels(), hard_negatives=narrow.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(loss(z[:, :1], labels(), hard_negatives=narrow), with_copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        nested = torch.nested.nested_tensor([*hard.detach()])
    with pytest.raises(TypeError, match="hard_negatives: expected a dense tensor"):
        loss(z, labels(), hard_negatives=nested)
    for wrong in (hard[1:], hard[..., 1:], hard[0, 0]):
        with pytest.raises(ValueError, match="hard_negatives: expected shape"):
            loss(z, labels(), hard_negatives=wrong)


@pytest.mark.parametrize("case", [name for name, make in CASES.items() if "clusters" in make()[1]])
@pytest.mark.parametrize("name", MEANS)
def test_means_over_pairs_are_those_of_the_usual_way(case: str, name: str, monkeypatch) -> None:
    z, options = CASES[case]()
    options.pop("normalize", None)
    leaves = [z, *(v for v in options.values() if isinstance(v, Tensor) and v.requires_grad)]
    names = {"clusters": "labels", "contrast_clusters": "contrast_labels"}
    options = {names.get(key, key): value for key, value in options.items()}
    if "contrasts" in options:
        options.setdefault("contrast_labels", torch.arange(len(options["contrasts"])) % 4 - 1)
    got = MEANS[name](z, **options)
    assert name_of(got) == "SmallMeansBackward"
    with torch.no_grad():
        assert torch.equal(MEANS[name](z, **options), got)
    gradients = torch.autograd.grad(got * -2.5, leaves)
    off(monkeypatch)
    usual = MEANS[name](z, **options)
    assert "SmallMeans" not in name_of(usual)
    assert got.dtype == usual.dtype
    torch.testing.assert_close(got, usual, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(usual * -2.5, leaves), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        slack = 2.0**-7 if a.dtype.itemsize == 2 else 3e-6
        torch.testing.assert_close(a, b, rtol=0, atol=slack * max(1e-3, b.abs().max().item()))


def test_a_mean_over_no_pairs_is_zero() -> None:
    z = x(N, D)
    for clusters in (torch.arange(N), torch.zeros(N, dtype=torch.int64)):
        loss = pair_contrastive_loss(z, clusters, pos_margin=9.0, neg_margin=-9.0)
        assert name_of(loss) == "SmallMeansBackward"
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros(N, D))


USUAL = {
    "weights": {"weights": torch.ones(N)},
    "terms": {"reduction": "none"},
    "ids": {"contrasts": torch.ones(N, D), "ids": torch.arange(N), "contrast_ids": torch.arange(N)},
    "bias": {"contrast_bias": torch.zeros(N)},
    "momentum key": {"positives": torch.ones(N, D)},
    "unsigned labels": {"clusters": labels().to(torch.uint64)},
    "queue": {"contrasts": [torch.ones(N, D)]},
}


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
@pytest.mark.parametrize("case", USUAL)
def test_other_calls_take_the_usual_way(name: str, case: str) -> None:
    loss, node = LOSSES[name]
    found = loss(x(N, D), **{"clusters": labels(), **USUAL[case]})
    assert node not in name_of(found)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [9, 130])
def test_statistics_change_no_bit(name: str, n: int) -> None:
    """Another number of threads would: that of a call depends on N and D."""
    z, clusters = x(n, 128), torch.arange(n) // 2
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = LOSSES[name][0](z, clusters)
        both, _ = LOSSES[name][0](z, clusters, return_stats=True)
        assert torch.equal(alone, both)
        assert torch.equal(torch.autograd.grad(alone, z)[0], torch.autograd.grad(both, z)[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LOSSES)
def test_sizes_and_backends(name: str, monkeypatch) -> None:
    loss, node = LOSSES[name]
    call = partial(loss, x(N, D), labels())
    monkeypatch.setattr(small, "MOST", N * N * D - 1)
    assert node not in name_of(call())
    monkeypatch.setattr(small, "MOST", N * N * D)
    assert node in name_of(call())
    with fastcl.use_backend("chunked"):
        assert node not in name_of(call())
        monkeypatch.setenv("FASTCL_BACKEND", "reference")
    assert node not in name_of(call())
    with fastcl.use_backend("cpu"):
        assert node in name_of(call())
    monkeypatch.setenv("FASTCL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        call()
    monkeypatch.setenv("FASTCL_BACKEND", "")
    assert node in name_of(call())


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_subclasses_and_what_is_intercepted_take_the_usual_way(name: str) -> None:
    class Rows(Tensor):
        pass

    loss, node = LOSSES[name]
    z = x(N, D)
    expected = loss(z, labels())
    assert node in name_of(expected)
    negated = torch.complex(torch.zeros(N, D), -z.detach()).conj().imag.requires_grad_()
    for rows in (z.detach().as_subclass(Rows).requires_grad_(), negated):
        got = loss(rows, labels())
        assert node not in name_of(got)
        torch.testing.assert_close(torch.as_tensor(got), expected)
    batched = torch.func.vmap(lambda c: loss(z.detach(), c))(labels().expand(2, N))
    torch.testing.assert_close(batched, expected.detach().expand(2))
    with pytest.raises(TypeError, match="clusters: expected a dense tensor"):
        loss(z, labels().to_sparse())


@pytest.mark.parametrize("name", LOSSES)
def test_refusals_are_those_of_the_usual_way(name: str) -> None:
    loss, _ = LOSSES[name]
    for wrong, message in (
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"temperature": float("nan")}, "temperature: expected a "),
        ({"temperature": torch.tensor(-1.0)}, "temperature: expected a positive number"),
        ({"clusters": labels()[1:]}, "clusters: expected shape"),
        ({"contrasts": torch.ones(N, D + 1)}, "contrasts: expected rows of dimension"),
        ({"contrasts": torch.ones(N - 1, D)}, "contrasts: expected at least"),
        ({"contrast_clusters": labels()}, "contrast_clusters: expected None"),
        ({"clusters": None}, "clusters: expected cluster ids"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(x(N, D), **{"clusters": labels(), **wrong})
    if "sigmoid" in name:
        with pytest.raises(ValueError, match="bias: expected a finite number"):
            loss(x(N, D), labels(), bias=torch.tensor(torch.inf))


def test_options_are_checked_by_type_although_equal_ones_are_known() -> None:
    z = x(N, D)
    cluster_infonce(z, labels(), symmetric=False)
    with pytest.raises(TypeError, match="symmetric: expected True or False, got 0"):
        cluster_infonce(z, labels(), symmetric=0)
    with pytest.raises(ValueError, match=r"reduction: expected one of .*, got \['mean'\]"):
        cluster_infonce(z, labels(), reduction=["mean"])


@pytest.mark.parametrize("name", ALL)
def test_gradients_belong_to_the_caller(name: str) -> None:
    """A second backward computes them again, so what the caller does to the first ones does not reach it."""
    z = x(N, D)
    loss = ALL[name][0](z, labels())
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.equal(second, kept)
    loss.backward(retain_graph=True)
    loss.backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, 2 * kept)


@pytest.mark.parametrize(
    ("name", "changed"), [*product(ALL, ("rows", "labels")), *((name, "temperature") for name in LOSSES)]
)
def test_changes_before_the_backward_are_noticed(name: str, changed: str) -> None:
    given = {"rows": x(N, D) * 1, "labels": labels(), "temperature": torch.tensor(0.3, requires_grad=True) * 1}
    options = {} if name in MEANS else {"temperature": given["temperature"]}
    loss = ALL[name][0](given["rows"], given["labels"], **options)
    given[changed].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("name", ALL)
def test_a_second_backward_reads_rows_where_they_are_then(name: str) -> None:
    z = x(N, D)
    loss = ALL[name][0](z, labels())
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    z.data = z.data.clone()
    assert torch.equal(torch.autograd.grad(loss, z)[0], first)


@pytest.mark.parametrize("name", ALL)
def test_a_hook_on_saved_tensors_may_change_their_strides(name: str) -> None:
    z = x(6, 2, D)
    pack = (
        (lambda t: t.detach().transpose(0, 1).contiguous() if t.dim() == 3 else t),
        (lambda t: t.transpose(0, 1) if t.dim() == 3 else t),
    )
    with torch.autograd.graph.saved_tensors_hooks(*pack):
        loss = ALL[name][0](z, torch.arange(6) // 2)
    assert type(loss.grad_fn).__name__.startswith(ALL[name][1])
    (first,), (again,) = torch.autograd.grad(loss, z, retain_graph=True), torch.autograd.grad(loss, z)
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ALL)
def test_second_derivatives_raise(name: str) -> None:
    z = x(N, D)
    (gradient,) = torch.autograd.grad(ALL[name][0](z, labels()), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_inference_mode_leaves_nothing_behind(name: str) -> None:
    """What is made once for all calls may be made there."""
    loss = partial(LOSSES[name][0], temperature=0.731)
    z = torch.randn(N, 2, D)
    with torch.inference_mode():
        expected = loss(z)
        assert expected.is_inference()
    z.requires_grad_()
    got = loss(z)
    got.backward()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("byte", [0xFF, 0x7F])  # NaN; 3e38 as float32
def test_nothing_is_read_that_was_not_written(name: str, byte: int, monkeypatch) -> None:
    z = x(N, D)
    expected = ALL[name][0](z, labels())
    (gradient,) = torch.autograd.grad(expected, z)

    def filled(call) -> None:
        workspace = torch.full((call.workspace,), byte, dtype=torch.uint8)
        call.run(workspace.data_ptr())

    monkeypatch.setattr(native, "run", filled)
    got = ALL[name][0](z, labels())
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got, z)[0], gradient)


def test_threads_do_not_share_their_workspace() -> None:
    problems = [(x(40 + k, D, seed=k), torch.arange(40 + k) // 2) for k in range(6)]
    expected = [cluster_infonce(*problem).item() for problem in problems]
    found: list[list[float]] = [[] for _ in problems]

    def work(k: int) -> None:
        found[k] = [cluster_infonce(*problems[k]).item() for _ in range(50)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[value] * 50 for value in expected]


def test_no_rows_and_one_row() -> None:
    empty, one = x(0, D), x(1, D)
    for loss in (cluster_infonce, sigmoid_loss):
        assert loss(empty, torch.zeros(0, dtype=torch.int64)).item() == 0
        assert loss(one, torch.zeros(1, dtype=torch.int64)).item() == 0
    assert fastcl.SigLipLoss()(empty, empty, 1.0).item() == 0


@pytest.mark.parametrize("call", [fastcl.ClipLoss(), fastcl.SigLipLoss()])
def test_losses_of_image_and_text(call, monkeypatch) -> None:
    image, text = x(N, D), x(N, D, seed=1)
    scale = Parameter(torch.tensor(3.0))
    got = call(image, text, scale)
    assert "Small" in name_of(got)
    assert torch.equal(call(image, text, scale, output_dict=True)["contrastive_loss"], got)
    found = torch.autograd.grad(got, (image, text, scale))
    off(monkeypatch)
    usual = call(image, text, scale)
    assert "Small" not in name_of(usual)
    torch.testing.assert_close(got, usual)
    for a, b in zip(found, torch.autograd.grad(usual, (image, text, scale)), strict=True):
        torch.testing.assert_close(a, b)
    for wrong, error, message in (
        ({"output_dict": 1}, TypeError, "output_dict: expected True or False"),
        ({"text_features": x(N + 1, D)}, ValueError, f"text_features: expected {N} rows"),
        ({"image_features": x(N, 2, D), "text_features": x(N, 2, D)}, ValueError, "image_features: expected shape"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale: expected a positive number"),
    ):
        with pytest.raises(error, match=message):
            call(**{"image_features": image, "text_features": text, "logit_scale": scale, **wrong})


def test_the_native_calls_refuse_what_makes_no_sense() -> None:
    z, clusters, scale = torch.randn(N, D), labels(), torch.tensor([2.0])
    rows = small.rows_of(z)
    room = torch.zeros(1000).data_ptr()

    def described(two: bool) -> tuple[int, ...]:
        other = rows if two else (0,) * 5
        address = clusters.data_ptr()
        return *rows, *other, D, address, address if two else 0, 0, 0, scale.data_ptr(), 1, 0, 0, 0, 0, 0, 1, 0

    def pairs(two: bool, *options: object, weights: int = room, sums: int = 0, of_rows: bool = False) -> None:
        numbers = (0, False, room, of_rows, weights, sums, sums, sums, 0, 0, 0, 0, 0)
        native.native_module().pairs(native.engine()[0], described(two), numbers, 0.0, 0.0, *options)

    pairs(True, room, True)
    pairs(False, room, False, True)
    for wrong, said in (
        (lambda: pairs(True), "sums: a null pointer"),
        (lambda: pairs(True, room, weights=0), "total: without weights"),
        (lambda: pairs(True, room, True, of_rows=True), "narrow: of single numbers only"),
        (lambda: pairs(True, room, False, True), "negatives_alone: of self-contrast"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
    outputs = (False, 0, 0, 0, room, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="negatives_alone: of self-contrast"):
        native.native_module().mean(native.engine()[0], described(True), outputs, False, True)
