"""Options of losses: one record for module, functional form, presets, signatures and repr."""

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl.losses.options import LossOptions, OptionKeywords, option_names

PRESETS = (fastcl.NTXentLoss, fastcl.DCLLoss, fastcl.SupConLoss, fastcl.MoCoLoss)
USE = """
import fastcl
loss = fastcl.NTXentLoss(0.5, normalize=False)
number: float = loss.margin
flag: bool = loss.normalize
fastcl.NTXentLoss(0.5, symmetric=True)
fastcl.DCLLoss(label_smoothing=0.1)
fastcl.ClusterInfoNCE(0.5, margins=0.1)
"""


def test_keywords_are_the_options() -> None:
    assert option_names(OptionKeywords) == LossOptions._fields


@pytest.mark.parametrize("kind", [fastcl.ClusterInfoNCE, *PRESETS])
def test_signatures_and_hints_spell_the_options_out(kind) -> None:
    shown = inspect.signature(kind).parameters
    hints = typing.get_type_hints(kind.__init__)
    assert set(shown) == {"temperature", *kind._takes}
    for name in kind._takes:
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[name].default == LossOptions._field_defaults[name]
        assert name in hints
    loss = kind(**{name: LossOptions._field_defaults[name] for name in kind._takes})
    for name in LossOptions._fields:
        assert f"{name}=" in repr(loss) or not getattr(loss, name)


def test_options_that_a_preset_does_not_take_are_refused_by_name() -> None:
    for kind in PRESETS:
        for name in set(LossOptions._fields) - set(kind._takes):
            with pytest.raises(TypeError, match=f"{kind.__name__}: expected options out of .*; got '{name}'"):
                kind(**{name: LossOptions._field_defaults[name]})
    assert repr(fastcl.ClipLoss(label_smoothing=0.1, gather="ring")) == "ClipLoss(label_smoothing=0.1, gather='ring')"


def test_modules_saved_before_an_option_existed_still_work() -> None:
    z = torch.randn(4, 2, 3)
    for loss, call in (
        (fastcl.ClusterInfoNCE(), lambda loss: loss(z)),
        (fastcl.ClipLoss(), lambda loss: loss(z[:, 0], z[:, 1], 1.0)),
    ):
        expected = call(loss)
        del loss.__dict__["label_smoothing"]
        assert torch.equal(call(loss), expected)
        assert "label_smoothing" not in repr(loss)


def test_type_checkers_know_the_options(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "use.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"MYPYPATH": str(Path(fastcl.__file__).parents[1]), "PATH": ""},
    )
    lines = sorted({int(line.split(":")[1]) for line in done.stdout.splitlines() if line.startswith("use.py")})
    assert lines == [6, 7, 8], done.stdout + done.stderr
