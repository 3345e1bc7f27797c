"""The fuzzer's targets: valid calls of everything public, and values that may replace an argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastcl
from fastcl import functional
from tests.support.strategies import generator

# Values


class Subclass(Tensor):
    """A tensor subclass, which torch's default `__torch_function__` lets through."""


def _dtypes() -> list[torch.dtype]:
    return sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def numbers(value: Any) -> Tensor:
    """A plain float32 tensor: the argument, or another one if the argument is no such tensor."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and value.numel():
        return value.detach().float()
    return torch.randn(4, 3, generator=generator(1))


def of(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """Changes the tensor in the argument's place, or another tensor if the change fails."""

    def changed(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return [changed(value[0]), *value[1:]]
        try:
            return change(value.detach() if isinstance(value, Tensor) else numbers(value))
        except (RuntimeError, TypeError, IndexError, NotImplementedError):  # the change does not apply
            return change(torch.randn(4, 3, generator=generator(1)))

    return changed


def as_dtype(dtype: torch.dtype) -> Callable[[Any], Any]:
    def convert(tensor: Tensor) -> Tensor:
        if dtype in (torch.quint8, torch.qint8, torch.qint32):
            return torch.quantize_per_tensor(tensor.float(), 0.1, 0, dtype)
        try:
            return tensor.to(dtype)
        except (RuntimeError, TypeError, NotImplementedError):  # torch has no such conversion
            return torch.empty(tensor.shape, dtype=dtype)

    return of(convert)


def with_value(number: float) -> Callable[[Any], Any]:
    def changed(value: Tensor) -> Tensor:
        value = value.clone()
        value.view(-1)[-1] = number
        return value

    return of(changed)


def strided_apart(value: Tensor) -> Tensor:
    return torch.stack((value, value), -1)[..., 0]


def nested(layout: torch.layout) -> Callable[[Any], Any]:
    return of(lambda value: torch.nested.nested_tensor(list(value.reshape(len(value), -1)), layout=layout))


def always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


# For each name a function of the valid value in the argument's place. The first ones shrink best.
VALUES: dict[str, Callable[[Any], Any]] = {
    "None": always(None),
    "0": always(0),
    "1": always(1),
    "2": always(2),
    "-1": always(-1),
    "0.5": always(0.5),
    "2**62": always(2**62),
    "10**400": always(10**400),
    "1e-320": always(1e-320),
    "1e300": always(1e300),
    "nan": always(float("nan")),
    "inf": always(float("inf")),
    "-inf": always(float("-inf")),
    "1j": always(1j),
    "True": always(True),
    "'mean'": always("mean"),
    "'lse_all'": always("lse_all"),
    "'chunked'": always("chunked"),
    "bytes": always(b"x"),
    "list": always([0.5, 0.5]),
    "empty list": always([]),
    "empty tuple": always(()),
    "nested list": always([[1.0, 2.0]]),
    "tuple of a list": always(([1],)),
    "dict": always({}),
    "set": always({"lse_all"}),
    "object": always(object()),
    "class": always(int),
    "module": always(nn.Linear(2, 2)),
    "function": always(lambda k: [1.0] * k),
    "dtype": always(torch.float16),
    "generator": always(torch.Generator()),
    "np.float64": always(np.float64(0.5)),
    "np.float32": always(np.float32(0.5)),
    "np.int32": always(np.int32(2)),
    "np.bool": always(np.bool_(True)),
    "array": of(lambda value: value.float().numpy()),
    "queue": always(fastcl.MemoryQueue(4, 3)),
    "bank": always(fastcl.MemoryBank(4, 3)),
    "list of itself": lambda value: [value],
    "list of itself twice": lambda value: [value, value],
    "list with None": lambda value: [value, None],
    "itself twice": lambda value: (value, value),
    # shapes
    "scalar": of(lambda value: value.reshape(-1)[0]),
    "a vector of one": of(lambda value: value.reshape(-1)[:1]),
    "first": of(lambda value: value[0]),
    "one dimension more": of(lambda value: value[None]),
    "one dimension more behind": of(lambda value: value[..., None]),
    "no rows": of(lambda value: value[:0]),
    "one row": of(lambda value: value[:1]),
    "a row less": of(lambda value: value[:-1]),
    "a row more": of(lambda value: torch.cat((value, value[:1]))),
    "no columns": of(lambda value: value[..., :0]),
    "a column less": of(lambda value: value[..., :-1]),
    "flat": of(lambda value: value.reshape(-1)),
    "transposed": of(lambda value: value.T if value.dim() == 2 else value.permute(*reversed(range(value.dim())))),
    # strides, devices, classes
    "apart": of(strided_apart),
    "expanded": of(lambda value: value[:1].expand(value.shape)),
    "backwards": of(lambda value: value.flip(0)),
    "negative bit": of(lambda value: torch._neg_view(value)),
    "conjugate": of(lambda value: torch.complex(value.float(), value.float()).conj()),
    "imaginary part": of(lambda value: torch.complex(value.float(), value.float()).conj().imag),
    "requires grad": of(lambda value: value.float().clone().requires_grad_()),
    "non-leaf": of(lambda value: value.float().clone().requires_grad_() * 1),
    "parameter": of(lambda value: nn.Parameter(value.float(), True)),
    "integer parameter": of(lambda value: nn.Parameter(value.long(), False)),
    "subclass": of(lambda value: value.as_subclass(Subclass)),
    "meta": of(lambda value: value.to("meta")),
    "inference": of(lambda value: _inference(value)),
    # layouts
    "sparse": of(lambda value: value.to_sparse()),
    "sparse csr": of(lambda value: value.to_sparse_csr()),
    "sparse csc": of(lambda value: value.to_sparse_csc()),
    "mkldnn": of(lambda value: value.float().to_mkldnn()),
    "nested": nested(torch.strided),
    "jagged": nested(torch.jagged),
    # numbers
    "ones": of(torch.ones_like),
    "zeros": of(torch.zeros_like),
    "minus ones": of(lambda value: torch.full_like(value, -1)),
    "a NaN": with_value(float("nan")),
    "an infinity": with_value(float("inf")),
    "minus infinity": with_value(float("-inf")),
    "3e38": with_value(3e38),
    "1e-42": with_value(1e-42),
    "2**62 in it": of(lambda value: torch.full_like(value.long(), 2**62)),
    "-2**63 in it": of(lambda value: torch.full_like(value.long(), -(2**63))),
    "2**40 in it": of(lambda value: torch.full_like(value.long(), 2**40)),
    "uint64 beyond int64": of(lambda value: torch.full(value.shape, 2**64 - 1, dtype=torch.uint64)),
    "tensor(0.3)": always(torch.tensor(0.3)),
    "tensor(3)": always(torch.tensor(3)),
    "tensor(True)": always(torch.tensor(True)),
    "two numbers": always(torch.ones(2)),
    "a sparse number": always(torch.tensor(0.3).to_sparse()),
    "a number of dtype float8": always(torch.tensor(0.3).to(torch.float8_e4m3fn)),
    "a number on meta": always(torch.tensor(0.3, device="meta")),
    "a number as parameter": always(nn.Parameter(torch.tensor(0.3))),
    **{str(dtype): as_dtype(dtype) for dtype in _dtypes()},
}


def _inference(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.clone()


def value(name: str, original: Any) -> Any:
    with warnings.catch_warnings():  # torch warns that some layouts and dtypes are prototypes or deprecated
        warnings.simplefilter("ignore")
        return VALUES[name](original)


# Calls


@dataclass(frozen=True)
class Target:
    """A public function. call: runs it on arguments; names: arguments that messages may name."""

    call: Callable[..., Any]
    names: frozenset[str]
    examples: tuple[dict[str, Any], ...]
    changed: tuple[str, ...] = ()  # arguments that a call changes unless it raises
    parts: frozenset[str] = field(default_factory=frozenset)


N, M, D, K = 5, 7, 3, 4


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def ids(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 3, (n,), generator=generator(seed))


def masses(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator(3)) + 0.1


def queue(**options: Any) -> fastcl.MemoryQueue:
    made = fastcl.MemoryQueue(6, D, **options)
    stored = {name: ids(4) for name in options}
    made.enqueue(x(4, D, seed=5), **stored)
    return made


def bank(clusters: Tensor | None = None) -> fastcl.MemoryBank:
    made = fastcl.MemoryBank(6, D)
    made.update(torch.tensor([0, 2, 3, 5]), x(4, D, seed=6), clusters)
    return made


ROWS = {"embeddings": x(N, D), "clusters": ids(N)}
TWO_SETS = {"embeddings": x(N, D), "contrasts": x(M, D, seed=1)}
OF_CLUSTERS: tuple[dict[str, Any], ...] = (
    ROWS,
    {"embeddings": x(N, 2, D), "positives": x(N, D, seed=2), "weights": masses(N)},
    TWO_SETS | {"ids": ids(N), "contrast_ids": ids(M), "temperature": nn.Parameter(torch.tensor(0.2))},
    TWO_SETS | {"clusters": ids(N), "contrast_clusters": ids(M, 1), "return_stats": True},
    ROWS | {"contrasts": queue(clusters=True, ids=True), "ids": ids(N)},
    ROWS | {"contrasts": bank(), "positives": x(N, D)},
    ROWS | {"contrasts": [x(M, D), bank(ids(4))], "contrast_clusters": ids(M)},
)
ASSIGNED: tuple[dict[str, Any], ...] = (
    {"embeddings": x(N, 2, D), "assignments": masses(N, 2, K)},
    TWO_SETS | {"assignments": masses(N, K), "contrast_assignments": masses(M, K), "contrast_bias": x(M)},
)
WITH_BIAS = (TWO_SETS | {"contrast_bias": x(M)}, ROWS | {"contrast_bias": x(N)})
OF_CLASSES = {"embeddings": x(N, D), "labels": ids(N), "prototypes": x(K, D, seed=1)}
OF_LABELS: tuple[dict[str, Any], ...] = (
    {"embeddings": x(N, D), "labels": ids(N)},
    {"embeddings": x(N, D), "labels": ids(N), "contrasts": x(M, D), "contrast_labels": ids(M), "base": 0.1},
)
OF_A_QUEUE: dict[str, Any] = {"query": x(N, D), "key": x(N, D, seed=1), "queue": x(M, D, seed=2)}
OF_PROTOTYPES: tuple[dict[str, Any], ...] = (
    {"embeddings": x(N, D), "clusters": ids(N), "prototypes": x(K, D, seed=1), "concentrations": masses(K)},
    {
        "embeddings": x(N, D), "clusters": ids(N) - 1, "prototypes": x(K, D, seed=1), "concentrations": masses(K),
        "num_negatives": 1, "negatives": ids(1), "generator": None,
    },
)  # fmt: skip
OPTIONS = (
    {"temperature": 0.2, "form": "inside", "margin": 0.1},
    {"denominator": "negatives", "reduction": "none", "normalize": False},
    {"temperature": torch.tensor(0.2), "reduction": "sum", "gather": "ring"},
)


def names_of(*functions: Callable[..., Any]) -> frozenset[str]:
    found = [part for function in functions for part in signature(function).parameters.values()]
    return frozenset(part.name for part in found if part.kind is not part.VAR_KEYWORD) - {"self"}


def function(call: Callable[..., Any], *examples: dict[str, Any]) -> Target:
    return Target(call, names_of(call), examples)


def module(
    kind: type[nn.Module], options: tuple[dict[str, Any], ...], *examples: dict[str, Any], method: str = "forward"
) -> Target:
    """The constructor with its own options, then a call."""
    classes = kind.mro()[:2] if kind is fastcl.PMSNLoss else (kind,)  # its further options are those of `MSNLoss`
    made, called = names_of(*(part.__init__ for part in classes)), names_of(getattr(kind, method))

    def call(**arguments: Any) -> Any:
        made_of = {name: value for name, value in arguments.items() if name in made and name not in called}
        passed = {name: value for name, value in arguments.items() if name in called}
        if "temperature" in arguments and "temperature" in made:
            made_of["temperature"] = passed.pop("temperature", arguments["temperature"])
        criterion = kind(**made_of)
        repr(criterion)
        return (criterion if method == "forward" else getattr(criterion, method))(**passed)

    combined = tuple(example | options[k % len(options)] for k, example in enumerate(examples)) if options else examples
    return Target(call, made | called, combined)


def method(name: str, *examples: dict[str, Any]) -> Target:
    """A method of the memory, which an example passes as `self`."""
    kind = type(examples[0]["self"])
    called = getattr(kind, name)
    return Target(called, names_of(called), examples, ("self",))


TARGETS: dict[str, Target] = {
    "cluster_infonce": function(
        functional.cluster_infonce,
        *(e | o for e, o in zip((*OF_CLUSTERS, *WITH_BIAS), (*OPTIONS, {"symmetric": False}) * 3, strict=False)),
        *ASSIGNED,
        TWO_SETS | {"symmetric": True},
    ),
    "ClusterInfoNCE": module(fastcl.ClusterInfoNCE, OPTIONS, *OF_CLUSTERS, *WITH_BIAS),
    "ClusterInfoNCE of assignments": module(
        fastcl.ClusterInfoNCE, ({"symmetric": False}, {"symmetric": True}), *ASSIGNED
    ),
    "DebiasedLoss": module(fastcl.DebiasedLoss, ({"tau_plus": 0.1}, {"reduction": "none"}), *OF_CLUSTERS),
    "HardNegativeLoss": module(fastcl.HardNegativeLoss, ({"tau_plus": 0.1, "beta": 0.5}, {"beta": 2}), *OF_CLUSTERS),
    "NTXentLoss": module(fastcl.NTXentLoss, OPTIONS[:0], {"z0": x(N, D), "z1": x(N, D, seed=1), "return_stats": True}),
    "DCLLoss": module(fastcl.DCLLoss, ({"temperature": 0.3},), {"z0": x(N, D), "z1": x(N, D, seed=1)}),
    "SupConLoss": module(
        fastcl.SupConLoss,
        ({"form": "outside"},),
        {"features": x(N, 2, D), "labels": ids(N)},
        {"features": x(N, 2, D)},
        {"features": x(N, D), "labels": ids(N)},
    ),
    "ClipLoss": module(
        fastcl.ClipLoss,
        (),
        {"image_features": x(N, D), "text_features": x(N, D, seed=1), "logit_scale": 3.0, "output_dict": True},
        {"image_features": x(N, D), "text_features": x(N, D, seed=1), "logit_scale": nn.Parameter(torch.tensor(3.0))},
    ),
    "MoCoLoss": module(
        fastcl.MoCoLoss,
        ({"temperature": 0.3}, {"gather": True}),
        {"query": x(N, D), "key": x(N, D, seed=1), "queue": x(M, D, seed=2)},
        {"query": x(N, D), "key": x(N, D, seed=1), "queue": queue()},
        {"query": x(N, D), "key": x(N, D, seed=1), "queue": fastcl.MemoryQueue(4, D)},
    ),
    "SwAVLoss": module(
        fastcl.SwAVLoss,
        ({"epsilon": 0.5, "n_iters": 2}, {"prior": masses(K)}),
        {"high_resolution": [x(N, K), x(N, K, seed=1)], "low_resolution": [x(N, K, seed=2)]},
        {"high_resolution": [x(N, K), x(N, K, seed=1)], "queue_scores": [x(M, K), x(2, K)]},
    ),
    "SwAVLoss.assignments": module(
        fastcl.SwAVLoss,
        ({"epsilon": 0.5}, {"prior": fastcl.power_law_prior}),
        {"scores": x(N, K)},
        {"scores": x(N, K), "queue_scores": x(M, K)},
        method="assignments",
    ),
    "MSNLoss": module(
        fastcl.MSNLoss,
        ({"n_iters": 0, "sharpening": 0.5}, {"prior": masses(K), "kl": "prior_mean"}),
        {"anchors": x(2 * N, D), "targets": x(N, D, seed=1), "prototypes": x(K, D, seed=2)},
        {"anchors": x(N, D), "targets": x(N, D, seed=1), "prototypes": x(K, D, seed=2)},
    ),
    "MSNLoss.assignments": module(
        fastcl.MSNLoss, ({"n_iters": 1},), {"targets": x(N, D), "prototypes": x(K, D)}, method="assignments"
    ),
    "PMSNLoss": module(
        fastcl.PMSNLoss,
        ({"prior": fastcl.power_law_prior},),
        {"anchors": x(2 * N, D), "targets": x(N, D, seed=1), "prototypes": x(K, D, seed=2)},
    ),
    "SampledNCELoss": module(
        fastcl.SampledNCELoss,
        ({"num_negatives": 3}, {"form": "infonce", "log_normalizer": 1.0}),
        {"embeddings": x(N, D), "indices": ids(N), "bank": bank()},
        {"embeddings": x(N, D), "indices": ids(N), "bank": bank(), "negatives": ids(N * 2).reshape(N, 2)},
        {"embeddings": x(N, D), "indices": ids(N), "bank": bank(), "positives": x(N, D, seed=1)},
    ),
    "arcface_loss": function(functional.arcface_loss, OF_CLASSES, OF_CLASSES | {"margin": 90, "reduction": "none"}),
    "cosface_loss": function(functional.cosface_loss, OF_CLASSES, OF_CLASSES | {"margin": -1.0, "scale": 3}),
    "proxy_anchor_loss": function(functional.proxy_anchor_loss, OF_CLASSES, OF_CLASSES | {"alpha": 3, "margin": 0.5}),
    **{
        kind.__name__: module(kind, ({"num_classes": 7, "embedding_size": D, "margin": 0.2},), OF_CLASSES)
        for kind in (fastcl.ArcFaceLoss, fastcl.CosFaceLoss, fastcl.ProxyAnchorLoss)
    },
    "multi_similarity_loss": function(functional.multi_similarity_loss, *OF_LABELS),
    "MultiSimilarityLoss": module(fastcl.MultiSimilarityLoss, ({"alpha": 1}, {"beta": 3, "base": 0.2}), *OF_LABELS),
    "koleo_loss": function(functional.koleo_loss, {"embeddings": x(N, D), "p": 1.5, "eps": 0.1}),
    "KoLeoLoss": module(fastcl.KoLeoLoss, ({"p": 1.5, "reduction": "none"},), {"embeddings": x(N, D)}),
    "ldreg_loss": function(functional.ldreg_loss, {"embeddings": x(N, D), "k": 3}),
    "LDRegLoss": module(fastcl.LDRegLoss, ({"k": 2, "reduction": "none"},), {"embeddings": x(N, D)}),
    "wmse_loss": function(functional.wmse_loss, {"z_a": x(N, D), "z_b": x(N, D, seed=1), "eps": 0.2}),
    "WMSELoss": module(fastcl.WMSELoss, ({"eps": 0.5},), {"z_a": x(N, D), "z_b": x(N, D, seed=1)}),
    "scan_loss": function(functional.scan_loss, {"anchors": x(N, D), "neighbors": x(N, D), "entropy_weight": 5}),
    "SCANLoss": module(fastcl.SCANLoss, ({"entropy_weight": 1},), {"anchors": x(N, D), "neighbors": x(N, D, seed=1)}),
    "ascl_loss": function(functional.ascl_loss, OF_A_QUEUE, OF_A_QUEUE | {"neighbors": 3, "reduction": "none"}),
    "ASCLLoss": module(fastcl.ASCLLoss, ({"temperature": 0.2, "neighbors": 2},), OF_A_QUEUE),
    "hypersphere_loss": function(functional.hypersphere_loss, {"z_a": x(N, D), "z_b": x(N, D, seed=1), "lam": 0.5}),
    "HypersphereLoss": module(fastcl.HypersphereLoss, ({"t": 3, "alpha": 1},), {"z_a": x(N, D), "z_b": x(N, D)}),
    "dclw_loss": function(functional.dclw_loss, {"z0": x(N, D), "z1": x(N, D, seed=1), "return_stats": True}),
    "DCLWLoss": module(fastcl.DCLWLoss, ({"temperature": 0.3, "sigma": 2},), {"z0": x(N, D), "z1": x(N, D, seed=1)}),
    "proto_nce_loss": function(functional.proto_nce_loss, *OF_PROTOTYPES),
    "ProtoNCELoss": module(fastcl.ProtoNCELoss, (), *OF_PROTOTYPES),
    "contrastive_stats": function(
        fastcl.contrastive_stats,
        {"anchors": x(N, D), "anchor_clusters": ids(N)},
        {"anchors": x(N, D), "contrasts": x(M, D), "contrast_bias": x(M), "both": True, "want": ("lse_neg", "entropy")},
        {
            "anchors": x(N, D), "contrasts": x(M, D), "anchor_ids": ids(N), "contrast_ids": ids(M),
            "anchor_clusters": ids(N), "contrast_clusters": ids(M), "logit_scale": torch.tensor([1.0, 2.0]),
        },
        {"anchors": x(N, D), "anchor_assignments": masses(N, K), "logit_scale": torch.tensor(2.0)},
        {
            "anchors": x(N, D), "contrasts": x(M, D), "anchor_assignments": masses(N, K),
            "contrast_assignments": masses(M, K), "normalize_anchors": True,
        },
    ),
    "sinkhorn": function(
        fastcl.sinkhorn,
        {"scores": x(N, K), "prior": masses(K), "row_marginal": masses(N), "n_iters": 3},
        {"scores": x(2, N, K), "tol": 1e-3, "n_iters": 20, "init": x(K), "epsilon": torch.tensor(0.5)},
        {"scores": x(N, K), "group": None, "epsilon": 0.5, "init": x(K)},
    ),
    "uniform_prior": function(fastcl.uniform_prior, {"k": K}),
    "power_law_prior": function(fastcl.power_law_prior, {"k": K, "exponent": 0.5}),
    "prior_from_counts": function(fastcl.prior_from_counts, {"counts": masses(K)}, {"counts": torch.arange(K)}),
    "topk_similarity": function(
        fastcl.topk_similarity,
        {"queries": x(N, D), "keys": x(M, D), "k": 2},
        {"queries": x(N, D), "keys": x(M, D), "k": 2, "query_ids": ids(N), "key_ids": ids(M)},
    ),
    "knn_predict": function(
        fastcl.knn_predict,
        {"queries": x(N, D), "keys": x(M, D), "labels": ids(M), "k": 2, "temperature": 0.1, "num_classes": 3},
        {"queries": x(N, D), "keys": x(M, D), "labels": ids(M), "k": 2},
    ),
    "sampled_similarity": function(
        fastcl.sampled_similarity, {"queries": x(N, D), "keys": x(M, D), "indices": ids(N * 2).reshape(N, 2)}
    ),
    "alignment": function(fastcl.alignment, {"x": x(N, D), "y": x(N, D, seed=1), "alpha": 1.5}),
    "uniformity": function(fastcl.uniformity, {"embeddings": x(N, D), "t": 2.0}),
    "gather_rows": Target(
        lambda rows, others: fastcl.distributed.gather_rows(rows, others),
        frozenset({"rows", "others"}),
        ({"rows": x(N, D), "others": ids(N)},),
    ),
    "MemoryQueue": function(fastcl.MemoryQueue, {"size": 4, "dim": 3, "dtype": torch.float16, "clusters": True}),
    "MemoryBank": function(fastcl.MemoryBank, {"num_samples": 4, "dim": 3, "momentum": 0.1, "dtype": torch.float64}),
    "MemoryQueue.enqueue": method(
        "enqueue",
        {"self": queue(), "embeddings": x(N, D)},
        {"self": queue(clusters=True, ids=True), "embeddings": x(N, D), "clusters": ids(N), "ids": ids(N, 1)},
    ),
    "MemoryQueue.nearest": method("nearest", {"self": queue(), "embeddings": x(N, D)}),
    "MemoryBank.update": method(
        "update",
        {"self": bank(), "indices": ids(N), "embeddings": x(N, D)},
        {"self": bank(ids(4)), "indices": ids(N), "embeddings": x(N, D), "clusters": ids(N, 1)},
    ),
    "MemoryBank[]": method("__getitem__", {"self": bank(), "indices": ids(N)}),
}  # fmt: skip
