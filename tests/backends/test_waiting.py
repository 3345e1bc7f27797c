"""The helpers of tests on a CUDA device, tested without one: finding waits, and what follows a lost device."""

import os
import warnings

import pytest
import torch

from tests.support.lost_device import tidy
from tests.support.waiting import waiting_is_an_error


@pytest.fixture
def modes(monkeypatch) -> list[int]:
    """All modes that are set; the last one is active. torch warns when it has set one."""
    history = [1]

    def set_mode(mode: int | str) -> None:
        history.append({"default": 0, "warn": 1, "error": 2}.get(mode, mode))
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: history[-1])
    return history


def test_the_mode_is_on_inside_alone(modes) -> None:
    with waiting_is_an_error():
        assert modes[-1] == 2
    assert modes == [1, 2, 1]


def test_the_mode_ends_with_an_error(modes) -> None:
    with pytest.raises(RuntimeError, match="a call waits"), waiting_is_an_error():
        raise RuntimeError("a call waits")
    assert modes == [1, 2, 1]


def test_the_mode_ends_where_setting_it_raises(modes, monkeypatch) -> None:
    set_mode = torch.cuda.set_sync_debug_mode

    def raising(mode: int | str) -> None:
        set_mode(mode)
        if modes[-1] == 2:
            raise RuntimeError("another warning that is an error")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", raising)
    with pytest.raises(RuntimeError, match="another warning"), waiting_is_an_error():
        pytest.fail("the mode was not set")
    assert modes == [1, 2, 1]


@pytest.mark.usefixtures("modes")
def test_other_warnings_inside_are_errors() -> None:
    with pytest.raises(UserWarning, match="of the call"), waiting_is_an_error():
        warnings.warn("of the call", stacklevel=1)


class Ended(BaseException):
    pass


def test_a_process_whose_device_is_lost_ends(monkeypatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(RuntimeError, match="illegal memory access"):  # alone, the process has no successor
        tidy()
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(Ended):
        tidy()
    emptied = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    tidy()
    assert emptied == [True]
