"""Random values for the arguments of everything public: a call computes, or its error names one of its arguments."""

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcl
from fastcl.ops.backends import choose
from tests.support.fuzzing import TARGETS, VALUES, Target, value

FUNCTIONS = ("class", "module", "queue", "bank")  # functions as priors raise errors of their own


def tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        yield from tensors_in(list(result.values()))
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from tensors_in(part)
    elif hasattr(result, "__dataclass_fields__"):
        yield from tensors_in([getattr(result, name) for name in result.__dataclass_fields__])


def differentiate(result: Any) -> None:
    roots = [t for t in tensors_in(result) if t.requires_grad and not t.is_leaf]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])


def state_of(argument: Any) -> Any:
    return {
        key: (part.clone() if isinstance(part, Tensor) else part) for key, part in argument.state_dict().items()
    } | {"": len(argument)}


def check(target: Target, arguments: dict[str, Any]) -> None:
    memories = [part for part in arguments.values() if isinstance(part, (fastcl.MemoryQueue, fastcl.MemoryBank))]
    before = [state_of(memory) for memory in memories]
    message = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="logit_bias: ")
            differentiate(target.call(**arguments))
    except (TypeError, ValueError) as error:
        message = str(error)
    except RuntimeError as error:
        if not str(error).startswith(
            "Inference tensors cannot be saved for backward"
        ):  # torch's own error, which is right
            raise
        return
    if message is not None:
        named = re.match(r"(\w+)(\[\w+\])*: ", message)
        assert named is not None, f"not an error of an argument: {message}"
        assert named[1] in target.names | {"use_backend"}, f"not an argument: {message}"
        for memory, state in zip(memories, before, strict=True):
            assert_same(state_of(memory), state)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, part in expected.items():
        same = torch.equal(found[key], part) if isinstance(part, Tensor) else found[key] == part
        assert same, f"{key} was changed by a call that raised"


@st.composite
def changes(draw: st.DrawFn, target: Target) -> tuple[int, dict[str, str]]:
    """The index of an example, and values by name for up to three of its arguments or of those that it omits."""
    example = draw(st.integers(0, len(target.examples) - 1))
    own = [name for name in target.examples[example] if name != "self"]
    names = st.one_of(st.sampled_from(own), st.sampled_from(sorted(target.names)))
    found = draw(st.dictionaries(names, st.sampled_from(list(VALUES)), min_size=1, max_size=3))
    assume(found.get("prior") not in FUNCTIONS)
    return example, found


@pytest.mark.parametrize("name", TARGETS)
def test_right_calls(name) -> None:
    """The base of the next test is valid."""
    for example in TARGETS[name].examples:
        differentiate(TARGETS[name].call(**copy.deepcopy(example)))


# Examples per target, about 2000 calls in all; the profile's number if the profile draws new ones.
EXAMPLES = 60 if settings.default.derandomize else settings.default.max_examples
PLAIN = [name for name in choose.AVAILABLE if name not in ("triton", "cuda")]


@pytest.mark.parametrize("name", TARGETS)
def test_any_argument(name) -> None:
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES)
    @given(changes(target), st.sampled_from(PLAIN))
    def run(change: tuple[int, dict[str, str]], backend: str) -> None:
        example = copy.deepcopy(target.examples[change[0]])
        changed = {place: value(kind, example.get(place)) for place, kind in change[1].items()}
        with fastcl.use_backend(backend):
            check(target, example | changed)

    run()
