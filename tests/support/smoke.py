"""Readable names of parameters, and which of them are in the tier ``smoke`` of the tests on a GPU."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def marked(parameters: Sequence[Any], smoke: Collection[str]) -> list[Any]:
    """The parameters, those whose ids are in `smoke` with the mark. Every id in `smoke` must exist."""
    unknown = set(smoke) - {parameter.id for parameter in parameters}
    assert not unknown, f"no parameter is called {', '.join(map(repr, unknown))}"
    return [
        pytest.param(*parameter.values, id=parameter.id, marks=pytest.mark.smoke if parameter.id in smoke else ())
        for parameter in parameters
    ]
