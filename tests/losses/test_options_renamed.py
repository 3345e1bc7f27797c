"""Arguments and names of other libraries: the message says what each is called here."""

import inspect

import pytest

import fastcl

CALLS = {
    "open_clip's local_loss": (lambda: fastcl.ClipLoss(local_loss=True), "ClipLoss: .*'local_loss'; gather=True"),
    "open_clip's rank": (lambda: fastcl.SigLipLoss(rank=0, world_size=2), "SigLipLoss: .*'rank'; gather=True"),
    "open_clip's cache_labels": (lambda: fastcl.ClipLoss(cache_labels=True), "'cache_labels'; .* leave it out"),
    "lightly's gather": (lambda: fastcl.NTXentLoss(0.1, gather_distributed=True), "NTXentLoss: .*'gather_distributed'"),
    "lightly's gather of DCLW": (lambda: fastcl.DCLWLoss(gather_distributed=True), "DCLWLoss: .*'gather_distributed'"),
    "lightly's bank": (lambda: fastcl.NTXentLoss(memory_bank_size=9), "'memory_bank_size'; .*MemoryQueue"),
    "lightly's weight_fn": (lambda: fastcl.DCLLoss(0.1, weight_fn=abs), "'weight_fn'; DCLWLoss"),
    "lightly's epsilon": (lambda: fastcl.SwAVLoss(sinkhorn_epsilon=0.1), "SwAVLoss: .*it is called epsilon here"),
    "lightly's iterations": (lambda: fastcl.MSNLoss(sinkhorn_iterations=3), "MSNLoss: .*it is called n_iters here"),
    "lightly's weight": (lambda: fastcl.PMSNLoss(regularization_weight=1), "PMSNLoss: .*called prior_weight here"),
    "lightly's exponent": (lambda: fastcl.PMSNLoss(power_law_exponent=0.5), "functools.partial.power_law_prior"),
    "SupContrast's": (lambda: fastcl.SupConLoss(0.1, base_temperature=0.07), "SupConLoss: .*'base_temperature'"),
    "metric learning's": (lambda: fastcl.metric_learning.SupConLoss(reducer=None), "SupConLoss: .*'reducer'"),
}


@pytest.mark.parametrize("case", CALLS)
def test_arguments_of_other_libraries(case) -> None:
    call, message = CALLS[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_other_unknown_arguments_and_signatures_stay() -> None:
    for kind in (fastcl.ClipLoss, fastcl.SwAVLoss, fastcl.MSNLoss, fastcl.SigLipLoss, fastcl.DCLWLoss):
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            kind(other=1)
    assert list(inspect.signature(fastcl.ClipLoss).parameters) == ["label_smoothing", "gather", "group"]


def test_names_of_other_libraries() -> None:
    with pytest.raises(AttributeError, match="'SwaVLoss': it is called SwAVLoss here"):
        _ = fastcl.SwaVLoss
    with pytest.raises(ImportError, match="'CrossBatchMemory': it is called MemoryQueue here"):
        from fastcl import CrossBatchMemory  # noqa: F401
    with pytest.raises(AttributeError, match=r"no attribute 'other'$"):
        _ = fastcl.other
    assert not hasattr(fastcl, "SwaVLoss")
