"""Bad input: the error names the argument and what came."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl.functional import cluster_infonce
from fastcl.losses.options import LossOptions
from tests.support.strategies import generator


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(0)).to(dtype)


def ids(n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.arange(n).to(dtype)


# Arguments, the argument that the message must name, and how it must describe what came.
STATS = {
    "anchors as list": ({"anchors": [[1.0]]}, "anchors", "list"),
    "anchors of one dimension": ({"anchors": x(4)}, "anchors", r"\[4\]"),
    "anchors of three dimensions": ({"anchors": x(4, 2, 3)}, "anchors", r"\[4, 2, 3\]"),
    "integer anchors": ({"anchors": torch.ones(4, 3, dtype=torch.int64)}, "anchors", "int64"),
    "complex anchors": ({"anchors": torch.ones(4, 3, dtype=torch.complex64)}, "anchors", "complex64"),
    "bool anchors": ({"anchors": torch.ones(4, 3, dtype=torch.bool)}, "anchors", "bool"),
    "contrasts as list": ({"contrasts": [x(4, 3)]}, "contrasts", "list"),
    "contrasts of one dimension": ({"contrasts": x(3)}, "contrasts", r"\[3\]"),
    "contrasts of another dimension": ({"contrasts": x(4, 2)}, "contrasts", r"\[4, 2\]|\b2\b"),
    "integer contrasts": ({"contrasts": torch.ones(4, 3, dtype=torch.int32)}, "contrasts", "int32"),
    "contrasts on another device": ({"contrasts": x(4, 3).to("meta")}, "contrasts", "meta"),
    "bool clusters": ({"anchor_clusters": torch.ones(4, dtype=torch.bool)}, "anchor_clusters", "bool"),
    "float clusters": ({"anchor_clusters": torch.ones(4)}, "anchor_clusters", "float32"),
    "clusters as list": ({"anchor_clusters": [0, 1, 2, 3]}, "anchor_clusters", "list"),
    "too few clusters": ({"anchor_clusters": ids(3)}, "anchor_clusters", r"\[3\]|\b3\b"),
    "clusters of two dimensions": ({"anchor_clusters": ids(4)[:, None]}, "anchor_clusters", r"\[4, 1\]"),
    "clusters on another device": ({"anchor_clusters": ids(4).to("meta")}, "anchor_clusters", "meta"),
    "contrast_clusters in self-contrast": ({"contrast_clusters": ids(4)}, "contrast_clusters", ""),
    "anchor_clusters alone": ({"contrasts": x(5, 3), "anchor_clusters": ids(4)}, "contrast_clusters", "None"),
    "contrast_clusters alone": ({"contrasts": x(5, 3), "contrast_clusters": ids(5)}, "anchor_clusters", "None"),
    "too many contrast_clusters": (
        {"contrasts": x(5, 3), "anchor_clusters": ids(4), "contrast_clusters": ids(6)},
        "contrast_clusters",
        r"\[6\]|\b6\b",
    ),
    "bool contrast_clusters": (
        {"contrasts": x(5, 3), "anchor_clusters": ids(4), "contrast_clusters": torch.ones(5, dtype=torch.bool)},
        "contrast_clusters",
        "bool",
    ),
    "anchor_ids in self-contrast": ({"anchor_ids": ids(4)}, "anchor_ids", ""),
    "contrast_ids in self-contrast": ({"contrast_ids": ids(4)}, "contrast_ids", ""),
    "anchor_ids alone": ({"contrasts": x(5, 3), "anchor_ids": ids(4)}, "contrast_ids", "None"),
    "contrast_ids alone": ({"contrasts": x(5, 3), "contrast_ids": ids(5)}, "anchor_ids", "None"),
    "too few anchor_ids": (
        {"contrasts": x(5, 3), "anchor_ids": ids(3), "contrast_ids": ids(5)},
        "anchor_ids",
        r"\[3\]|\b3\b",
    ),
    "float contrast_ids": (
        {"contrasts": x(5, 3), "anchor_ids": ids(4), "contrast_ids": x(5)},
        "contrast_ids",
        "float32",
    ),
    "bias of another length": ({"contrasts": x(5, 3), "contrast_bias": x(4)}, "contrast_bias", r"\[4\]|\b4\b"),
    "bias of two dimensions": ({"contrasts": x(5, 3), "contrast_bias": x(4, 5)}, "contrast_bias", r"\[4, 5\]"),
    "integer bias": ({"contrasts": x(5, 3), "contrast_bias": ids(5)}, "contrast_bias", "int64"),
    "bias as number": ({"contrasts": x(5, 3), "contrast_bias": 1.0}, "contrast_bias", "float"),
    "bias of another length in self-contrast": ({"contrast_bias": x(3)}, "contrast_bias", r"\[3\]|\b3\b"),
    "both in self-contrast": ({"both": True}, "both", "True"),
    "both that is no bool": ({"contrasts": x(5, 3), "both": "yes"}, "both", "yes"),
    "normalize_contrasts in self-contrast": ({"normalize_contrasts": True}, "normalize_contrasts", ""),
    "logit_scale as string": ({"logit_scale": "1"}, "logit_scale", "str"),
    "logit_scale None": ({"logit_scale": None}, "logit_scale", "None"),
    "integer logit_scale tensor": ({"logit_scale": torch.tensor(1)}, "logit_scale", "int64"),
    "logit_scale of two dimensions": ({"logit_scale": torch.ones(1, 1)}, "logit_scale", r"\[1, 1\]"),
    "logit_scale empty": ({"logit_scale": torch.ones(0)}, "logit_scale", r"\[0\]"),
    "unknown field": ({"want": ("lse_all", "lse")}, "want", "lse"),
    "field as string": ({"want": "lse_all"}, "want", "lse_all"),
    "want that is no sequence": ({"want": 5}, "want", "5"),
    "want as tensor": ({"want": torch.tensor(0.3)}, "want", "float32"),
    "a field that cannot be compared": ({"want": (torch.ones(2),)}, "want", ""),
    "sparse scale": ({"logit_scale": torch.tensor(0.3).to_sparse()}, "logit_scale", "sparse"),
    "scale of float8": ({"logit_scale": torch.ones(()).to(torch.float8_e5m2)}, "logit_scale", "float8"),
    "bias of float8": ({"contrast_bias": x(4).to(torch.float8_e5m2)}, "contrast_bias", "float8"),
    "clusters of uint7": ({"anchor_clusters": torch.empty(4, dtype=torch.uint7)}, "anchor_clusters", "uint7"),
    "clusters of bits": ({"anchor_clusters": torch.empty(4, dtype=torch.bits8)}, "anchor_clusters", "bits8"),
    "scale NaN": ({"logit_scale": float("nan")}, "logit_scale", "nan"),
    "scale tensor beyond float32": ({"logit_scale": torch.tensor(1e39, dtype=torch.float64)}, "logit_scale", "1e.39"),
    "scale tensor inf": ({"logit_scale": torch.tensor([1.0, torch.inf])}, "logit_scale", "inf"),
    "scale on meta": ({"logit_scale": torch.tensor(2.0, device="meta")}, "logit_scale", "meta"),
}


@pytest.mark.parametrize("case", STATS)
def test_contrastive_stats(case) -> None:
    arguments, name, came = STATS[case]
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b") as error:
        fastcl.contrastive_stats(**({"anchors": x(4, 3)} | arguments))
    assert_tells(error, came)


def assert_tells(error: pytest.ExceptionInfo, came: str) -> None:
    assert type(error.value) in (ValueError, TypeError)
    error.match(came)
    error.match("expected")


TWO_SETS: dict[str, Any] = {"contrasts": x(5, 3)}
LOSS = {
    "embeddings as list": ({"embeddings": [[1.0]]}, "embeddings", "list"),
    "embeddings of one dimension": ({"embeddings": x(4)}, "embeddings", r"\[4\]"),
    "embeddings of four dimensions": ({"embeddings": x(4, 2, 2, 3)}, "embeddings", r"\[4, 2, 2, 3\]"),
    "integer embeddings": ({"embeddings": ids(12).reshape(4, 3)}, "embeddings", "int64"),
    "a single view without clusters": ({}, "clusters", r"\[4, 3\]|1 view|single view"),
    "a single view in three dimensions": ({"embeddings": x(4, 1, 3)}, "clusters", r"\[4, 1, 3\]|1 view|single view"),
    "bool clusters": ({"clusters": torch.ones(4, dtype=torch.bool)}, "clusters", "bool"),
    "float clusters": ({"clusters": x(4)}, "clusters", "float32"),
    "clusters as list": ({"clusters": [0, 0, 1, 1]}, "clusters", "list"),
    "too many clusters": ({"clusters": ids(5)}, "clusters", r"\[5\]|\b5\b"),
    "a cluster a row": ({"embeddings": x(4, 2, 3), "clusters": ids(8)}, "clusters", r"\[8\]|\b8\b"),
    "clusters of two dimensions": ({"clusters": ids(4)[None]}, "clusters", r"\[1, 4\]"),
    "clusters on another device": ({"clusters": ids(4).to("meta")}, "clusters", "meta"),
    "temperature 0": ({"temperature": 0.0}, "temperature", "0"),
    "negative temperature": ({"temperature": -0.1}, "temperature", "-0.1"),
    "temperature NaN": ({"temperature": float("nan")}, "temperature", "nan"),
    "infinite temperature": ({"temperature": float("inf")}, "temperature", "inf"),
    "temperature as string": ({"temperature": "0.1"}, "temperature", "str"),
    "temperature of a tensor 0": ({"temperature": torch.tensor(0.0)}, "temperature", "0"),
    "temperature of a negative tensor": ({"temperature": torch.tensor(-2.0)}, "temperature", "-2"),
    "temperature of a negative parameter": ({"temperature": nn.Parameter(torch.tensor(-2.0))}, "temperature", "-2"),
    "two temperatures": ({"temperature": torch.ones(2)}, "temperature", r"\[2\]"),
    "integer temperature tensor": ({"temperature": torch.tensor(1)}, "temperature", "int64"),
    "reduction that cannot be printed": ({"reduction": torch.empty(2, dtype=torch.uint3)}, "reduction", "uint3"),
    "weights of float8": ({"weights": torch.ones(4).to(torch.float8_e4m3fn), **TWO_SETS}, "weights", "float8"),
    "a long margin": ({"margin": 10**5000}, "margin", "int"),
    "unknown form": ({"form": "in"}, "form", "'in'"),
    "unknown denominator": ({"denominator": "positives"}, "denominator", "'positives'"),
    "unknown reduction": ({"reduction": "avg"}, "reduction", "'avg'"),
    "reduction None": ({"reduction": None}, "reduction", "None"),
    "negative margin": ({"margin": -0.1}, "margin", "-0.1"),
    "margin NaN": ({"margin": float("nan")}, "margin", "nan"),
    "margin as string": ({"margin": "0"}, "margin", "str"),
    "unknown gather": ({"gather": "star"}, "gather", "star"),
    "symmetric that is no bool": ({"symmetric": "yes", **TWO_SETS}, "symmetric", "yes"),
    "normalize that is no bool": ({"normalize": "yes"}, "normalize", "yes"),
    "symmetric self-contrast": ({"symmetric": True, "clusters": ids(4)}, "symmetric", ""),
    "symmetric unreduced of two sizes": ({"symmetric": True, "reduction": "none", **TWO_SETS}, "reduction", "none"),
    "contrasts as number": ({"contrasts": 1.0}, "contrasts", "float"),
    "contrasts as an empty list": ({"contrasts": []}, "contrasts", ""),
    "contrasts in a list that are no tensors": ({"contrasts": [x(4, 3), [1.0]]}, "contrasts", "list"),
    "contrasts of another dimension": ({"contrasts": x(4, 2)}, "contrasts", r"\[4, 2\]|\b2\b"),
    "contrasts of another dimension in a list": ({"contrasts": [x(4, 3), x(4, 2)]}, "contrasts", r"\[4, 2\]|\b2\b"),
    "contrasts in views": ({"contrasts": x(4, 2, 3)}, "contrasts", r"\[4, 2, 3\]"),
    "integer contrasts": ({"contrasts": ids(12).reshape(4, 3)}, "contrasts", "int64"),
    "contrasts on another device": ({"contrasts": x(4, 3).to("meta")}, "contrasts", "meta"),
    "fewer contrasts than anchors": ({"contrasts": x(3, 3)}, "contrasts", r"\b3\b"),
    "fewer contrasts than rows": ({"embeddings": x(4, 2, 3), "contrasts": x(7, 3)}, "contrasts", r"\b7\b"),
    "contrast_clusters in self-contrast": (
        {"clusters": ids(4), "contrast_clusters": ids(4)},
        "contrast_clusters",
        "",
    ),
    "too few contrast_clusters": ({"contrast_clusters": ids(4), **TWO_SETS}, "contrast_clusters", r"\[4\]|\b4\b"),
    "bool contrast_clusters": (
        {"contrast_clusters": torch.ones(5, dtype=torch.bool), **TWO_SETS},
        "contrast_clusters",
        "bool",
    ),
    "float contrast_clusters": ({"contrast_clusters": x(5), **TWO_SETS}, "contrast_clusters", "float32"),
    "ids of both in self-contrast": ({"clusters": ids(4), "ids": ids(4), "contrast_ids": ids(4)}, "contrast_ids", ""),
    "ids alone": ({"ids": ids(4), **TWO_SETS}, "contrast_ids", "None"),
    "contrast_ids alone": ({"contrast_ids": ids(5), **TWO_SETS}, "ids", "None"),
    "too few ids": ({"ids": ids(3), "contrast_ids": ids(5), **TWO_SETS}, "ids", r"\[3\]|\b3\b"),
    "too few contrast_ids": ({"ids": ids(4), "contrast_ids": ids(4), **TWO_SETS}, "contrast_ids", r"\[4\]|\b4\b"),
    "bool ids": (
        {"ids": torch.ones(4, dtype=torch.bool), "contrast_ids": ids(5), **TWO_SETS},
        "ids",
        "bool",
    ),
    "bias of another length": ({"contrast_bias": x(4), **TWO_SETS}, "contrast_bias", r"\[4\]|\b4\b"),
    "integer bias": ({"contrast_bias": ids(5), **TWO_SETS}, "contrast_bias", "int64"),
    "positives of another length": ({"positives": x(3, 3), **TWO_SETS}, "positives", r"\[3, 3\]"),
    "positives of another dimension": ({"positives": x(4, 2), **TWO_SETS}, "positives", r"\[4, 2\]"),
    "positives of rows": ({"embeddings": x(4, 2, 3), "positives": x(8, 3)}, "positives", r"\[8, 3\]"),
    "positives of three views": ({"embeddings": x(4, 2, 3), "positives": x(4, 3, 3)}, "positives", r"\[4, 3, 3\]"),
    "temperature below float32": ({"temperature": 1e-50}, "temperature", "1e-50"),
    "temperature tensor below float32": ({"temperature": torch.tensor(1e-50).double()}, "temperature", "0.0|1e-50"),
    "temperature above float32": ({"temperature": 10**400}, "temperature", "1000"),
    "endless margin": ({"margin": 10**400}, "margin", "1000"),
    "sparse embeddings": ({"embeddings": x(4, 3).to_sparse(), **TWO_SETS}, "embeddings", "sparse"),
    "sparse temperature": ({"temperature": torch.tensor(0.1).to_sparse()}, "temperature", "sparse"),
    "weights beyond float32": (
        {"weights": torch.full((4,), 1e39, dtype=torch.float64), "reduction": "sum", **TWO_SETS},
        "weights",
        r"1e\+39",
    ),
    "weights inf": ({"weights": torch.tensor([1.0, 1.0, torch.inf, 1.0]), **TWO_SETS}, "weights", "inf"),
    "positives as list": ({"positives": [1.0], **TWO_SETS}, "positives", "list"),
    "integer positives": ({"positives": ids(12).reshape(4, 3), **TWO_SETS}, "positives", "int64"),
    "too few weights": ({"weights": torch.ones(3), **TWO_SETS}, "weights", r"\[3\]|\b3\b"),
    "a weight a row": ({"embeddings": x(4, 2, 3), "weights": torch.ones(8)}, "weights", r"\[8\]|\b8\b"),
    "negative weights": ({"weights": torch.tensor([1.0, 1.0, -1.0, 1.0]), **TWO_SETS}, "weights", "-1|negative"),
    "weights NaN": ({"weights": torch.tensor([1.0, 1.0, torch.nan, 1.0]), **TWO_SETS}, "weights", "nan|NaN"),
    "weights as list": ({"weights": [1.0] * 4, **TWO_SETS}, "weights", "list"),
}
OF_THE_MODULE = ("temperature", *LossOptions._fields)


@pytest.mark.parametrize("case", LOSS)
def test_cluster_infonce(case) -> None:
    arguments, name, came = LOSS[case]
    with pytest.raises((ValueError, TypeError), match=rf"\b({name})\b") as error:
        cluster_infonce(**({"embeddings": x(4, 3)} | arguments))
    assert_tells(error, came)


def only_options(arguments: dict[str, Any]) -> bool:
    return bool(arguments) and all(name in OF_THE_MODULE for name in arguments)


@pytest.mark.parametrize("case", [case for case in LOSS if only_options(LOSS[case][0])])
def test_module_is_not_made_with_a_bad_option(case) -> None:
    arguments, name, came = LOSS[case]
    with pytest.raises((ValueError, TypeError), match=rf"\b({name})\b") as error:
        fastcl.ClusterInfoNCE(**arguments)
    assert_tells(error, came)


@pytest.mark.parametrize("case", [case for case in LOSS if not only_options(LOSS[case][0])])
def test_module(case) -> None:
    arguments, name, came = LOSS[case]
    options = {key: value for key, value in arguments.items() if key in OF_THE_MODULE}
    tensors = {"embeddings": x(4, 3)} | {key: value for key, value in arguments.items() if key not in OF_THE_MODULE}
    with pytest.raises((ValueError, TypeError), match=rf"\b({name})\b") as error:
        fastcl.ClusterInfoNCE(**options)(**tensors)
    assert_tells(error, came)


def test_temperature_of_the_call() -> None:
    with pytest.raises(ValueError, match=r"temperature.*expected.*-1"):
        fastcl.ClusterInfoNCE()(x(4, 2, 3), temperature=-1.0)


def test_types_and_values_are_told_apart() -> None:
    with pytest.raises(TypeError):
        cluster_infonce(x(4, 3), [0, 0, 1, 1])
    with pytest.raises(TypeError):
        cluster_infonce(x(4, 3), torch.ones(4))
    with pytest.raises(ValueError, match="clusters"):
        cluster_infonce(x(4, 3), ids(3))


def test_keyword_only_arguments() -> None:
    with pytest.raises(TypeError):
        cluster_infonce(x(4, 3), ids(4), 0.1)
    with pytest.raises(TypeError):
        fastcl.contrastive_stats(x(4, 3), None, None, None, 1.0)
    with pytest.raises(TypeError):
        fastcl.ClusterInfoNCE(0.1, "outside")


@pytest.mark.parametrize("name", ["", "Reference", "fast", None, 3, ["chunked"]])
def test_unknown_backend(name) -> None:
    with pytest.raises((ValueError, TypeError), match="expected") as error, fastcl.use_backend(name):
        pass
    error.match(re.escape(repr(name)))
    error.match("reference")


def test_temperature_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"^temperature: expected a tensor on cpu, got one on meta"):
        cluster_infonce(x(4, 2, 3), temperature=torch.tensor(0.1, device="meta"))


def test_good_arguments_pass() -> None:
    """The base of the tables above is valid, so each case fails for its own reason."""
    fastcl.contrastive_stats(x(4, 3))
    fastcl.contrastive_stats(x(4, 3), x(5, 3), ids(4), ids(5), anchor_ids=ids(4), contrast_ids=ids(5), both=True)
    fastcl.contrastive_stats(x(4, 3), x(5, 3), contrast_bias=x(5))
    fastcl.contrastive_stats(x(4, 3), contrast_bias=x(4), normalize_anchors=True, normalize_contrasts=True)
    cluster_infonce(x(4, 3), ids(4))
    cluster_infonce(
        x(4, 3),
        ids(4),
        contrast_clusters=ids(5),
        ids=ids(4),
        contrast_ids=ids(5),
        contrast_bias=x(5),
        positives=x(4, 3),
        weights=torch.ones(4),
        temperature=1,
        margin=1,
        **TWO_SETS,
    )
    cluster_infonce(x(4, 2, 3), temperature=torch.tensor(0.1), positives=x(4, 2, 3), weights=torch.ones(4))
    cluster_infonce(x(4, 3), symmetric=True, **TWO_SETS)


ROWS, BANK = x(4, 3), fastcl.MemoryBank(4, 3)
COUNTS = {
    "n_iters": (lambda: fastcl.sinkhorn(ROWS, n_iters=2**62), "n_iters: expected at most 2147483647, got 4611"),
    "n_iters of a module": (lambda: fastcl.SwAVLoss(n_iters=2**62), "n_iters: expected at most 2147483647"),
    "n_iters as tensor": (
        lambda: fastcl.MSNLoss(n_iters=torch.ones(2)),
        "n_iters: expected an integer, got a tor",
    ),
    "negative n_iters": (lambda: fastcl.MSNLoss(n_iters=-1), "n_iters: expected at least 0, got -1"),
    "a prior": (lambda: fastcl.power_law_prior(2**62), "k: expected at most 2147483647"),
    "a longer prior": (lambda: fastcl.uniform_prior(10**5000), "k: expected at most 2147483647"),
    "a queue": (lambda: fastcl.MemoryQueue(2**62, 3), "size: expected at most 11728124029610, got 4611"),
    "a bank": (lambda: fastcl.MemoryBank(4, 2**62), "dim: expected at most 2147483647"),
    "negatives": (lambda: fastcl.SampledNCELoss(num_negatives=2**62), "num_negatives: expected at most 2147483647"),
    "classes": (lambda: fastcl.knn_predict(ROWS, ROWS, ids(4), 1, num_classes=2**62), "num_classes: expected at most"),
    "labels": (lambda: fastcl.knn_predict(ROWS, ROWS, ids(4) + 2**40, 1), "labels: expected numbers below 2147483647"),
    "sparse indices": (lambda: BANK[ids(4).to_sparse()], "indices: expected a dense tensor, got a torch.sparse_coo"),
    "quantized indices": (
        lambda: BANK[torch.empty(4, dtype=torch.bits8)],
        "indices: expected integers, got torch.bits",
    ),
    "scores as list": (lambda: fastcl.SwAVLoss().assignments([1.0]), "scores: expected a tensor, got list"),
    "targets": (lambda: fastcl.MSNLoss().assignments(ROWS, x(4, 2)), r"prototypes: expected rows of dimension 3"),
    "no targets": (lambda: fastcl.MSNLoss().assignments(ROWS[:0], ROWS), "targets: expected at least one row"),
    "a prior of float8": (lambda: fastcl.MSNLoss(prior=torch.ones(4).to(torch.float8_e5m2)), "prior: .*float8"),
    "a sparse prior": (lambda: fastcl.SwAVLoss(prior=torch.ones(4).to_sparse()), "prior: expected a dense tensor"),
    "a prior on meta": (
        lambda: fastcl.MSNLoss(prior=torch.ones(4, device="meta"))(ROWS, ROWS, ROWS),
        "prior: expected a tensor on cpu, got one on meta",
    ),
    "stats with assignments": (
        lambda: cluster_infonce(ROWS, assignments=torch.ones(4, 2), return_stats=torch.ones(2)),
        "return_stats: expected True or False, got a torch.float32 tensor of shape",
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts_and_others(case) -> None:
    call, message = COUNTS[case]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()
