"""The files of a run: whole or not there, verified, and written by one run at a time."""

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcl.train import OptionError, WriteError, evaluate, files, loop, report
from fastcl.train.__main__ import main
from fastcl.train.files import append, claimed, load_checkpoint, save_checkpoint, write
from tests.support.training import metrics, options, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch) -> None:
    """They take most of the time, and are not the subject here."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(evaluate, "DRAWS", 1)


@pytest.fixture
def refusal(capsys):
    """The one line with which the trainer refuses a command."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([*arguments])
        assert exit_.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "step" not in line]  # the bar
        return line

    return run


@pytest.fixture(scope="module")
def finished(npz, tmp_path_factory) -> Path:
    """A run of two epochs, to be copied."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: None)
        patch.setattr(evaluate, "DRAWS", 1)
        assert main(options(npz, out, epochs=2)) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_every_flipped_byte_of_a_checkpoint_is_found(tmp_path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint({"method": {"w": torch.arange(40.0)}, "history": [{"loss": 1.5}], "data": "x"}, path)
    data = path.read_bytes()
    assert torch.equal(load_checkpoint(path)["method"]["w"], torch.arange(40.0))
    assert torch.load(path, weights_only=True)["history"] == [{"loss": 1.5}]  # for users, a file like any other
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(ValueError):
            load_checkpoint(path)
    for damaged in (data[:-1], data[: len(data) // 2], data + b"\0", b"", data[:100] + data[101:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            load_checkpoint(path)


def test_a_checkpoint_without_a_hash_may_be_an_old_one(tmp_path) -> None:
    torch.save({"data": "x"}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"no hash at its end: .* or written before checkpoints had a hash"):
        load_checkpoint(tmp_path / "c.pt")


def test_the_images_are_hashed_once_a_run(npz, tmp_path, monkeypatch) -> None:
    line = {"epoch": 1, "step": 1, "loss": 1.0, "lr": 1.0}
    monkeypatch.setattr(loop.Run, "_epoch", lambda *_: line)
    monkeypatch.setattr(loop, "knn_accuracy", lambda *_: 0.5)
    hashed = []
    monkeypatch.setattr(loop.Run, "finish", lambda *_: None)
    monkeypatch.setattr(report, "table", lambda _: "")
    monkeypatch.setattr(loop, "fingerprint", lambda images: hashed.append(images) or "hash")
    assert main(options(npz, tmp_path / "run", epochs=3)) == 0
    assert len(hashed) == 1
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["data"] == "hash"


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.95])
def test_resume_refuses_a_flipped_byte(copy, share, refusal) -> None:
    path = copy / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 4
    path.write_bytes(data)
    assert "the file is damaged" in refusal("--resume", str(copy))
    assert path.read_bytes() == data


def test_resume_refuses_a_config_that_the_checkpoint_was_not_trained_with(copy, refusal) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": 0.003}))
    assert "config.json has lr 0.003, but the checkpoint was trained with 0.002" in refusal("--resume", str(copy))


def test_a_second_run_is_refused_while_the_first_one_runs(npz, copy, tmp_path, refusal) -> None:
    with claimed(copy):
        assert f"--resume {copy} is in use by another process" in refusal("--resume", str(copy))
    assert main(["--resume", str(copy)]) == 0
    assert not (copy / files.LOCK).exists()
    with claimed(tmp_path / "new"):
        assert "is in use by another process" in refusal(*options(npz, tmp_path / "new", epochs=1))
    assert not (tmp_path / "new").exists()


def test_a_killed_process_leaves_no_lock(tmp_path) -> None:
    code = "import sys, time; from fastcl.train.files import claimed; from pathlib import Path\n"
    code += "with claimed(Path(sys.argv[1])):\n    print('claimed', flush=True)\n    time.sleep(600)"
    command = [sys.executable, "-c", code, tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        try:
            assert process.stdout.readline() == b"claimed\n"
            with pytest.raises(OptionError, match="in use"), claimed(tmp_path / "run"):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / files.LOCK).exists()
    with claimed(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_said_to(tmp_path, monkeypatch, capsys) -> None:
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with claimed(tmp_path / "run"):
        assert "start no second run there" in capsys.readouterr().err


def test_a_folder_that_was_claimed_in_vain_is_removed(tmp_path) -> None:
    with contextlib.suppress(RuntimeError), claimed(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise RuntimeError
    assert not (tmp_path / "a").exists()
    with contextlib.suppress(RuntimeError), claimed(tmp_path / "a" / "b"):
        write(tmp_path / "a" / "b" / "kept", "text")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_resume_begins_a_run_that_was_killed_before_its_first_checkpoint(finished, copy, refusal) -> None:
    for name in ("metrics.jsonl", "results.json"):
        (copy / name).unlink()
    (copy / "checkpoint.pt").rename(copy / "checkpoint.pt.part")
    (copy / files.LOCK).touch()
    assert main(["--resume", str(copy)]) == 0
    assert metrics(copy) == metrics(finished)
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(copy).items())
    (copy / "checkpoint.pt").unlink()  # but not one whose checkpoint is gone
    assert "has metrics: it was removed" in refusal("--resume", str(copy))


def test_out_takes_what_a_run_left_that_was_killed_before_its_config(npz, tmp_path, refusal) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json.part").write_text("{")
    (out / files.LOCK).touch()
    assert "nothing was trained there" in refusal("--resume", str(out))
    assert main(options(npz, out, epochs=1)) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt", "config.json", "metrics.jsonl", "results.json",
    ]  # fmt: skip


def test_links_are_not_followed(copy, tmp_path) -> None:
    other = tmp_path / "precious"
    other.write_text("mine")
    for name in ("metrics.jsonl", "checkpoint.pt", "results.json", "config.json"):
        (copy / f"{name}.part").symlink_to(other)
    (copy / "results.json").unlink()
    (copy / "results.json").symlink_to(other)
    assert main(["--resume", str(copy)]) == 0
    assert other.read_text() == "mine"
    assert not (copy / "results.json").is_symlink()
    (tmp_path / "line").symlink_to(other)
    with pytest.raises(WriteError, match="line cannot be written"):
        append(tmp_path / "line", "text")
    (tmp_path / files.LOCK).symlink_to(other)
    with pytest.raises(OptionError, match="cannot be written to"), claimed(tmp_path):
        pass
    assert other.read_text() == "mine"


def test_files_and_their_names_are_synchronised(tmp_path, monkeypatch) -> None:
    path, calls = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}")) if os.path.isdir("/proc/self/fd") else None
        calls.append(place and place.name)
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", noted)
    monkeypatch.setattr(files.os, "replace", lambda *names: calls.append("replace") or replace(*names))
    write(path, "one")
    append(path, " two")
    assert path.read_text() == "one two\n"
    expected = ["file.part", "replace", tmp_path.name, "file"]
    assert calls == (expected if calls[0] else [None, "replace", None, None])


@pytest.mark.parametrize(("number", "refused"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synchronised(number, refused, tmp_path, monkeypatch) -> None:
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", of_files_only)
    message = "cannot be synchronised to the disk: Input/output error"
    with pytest.raises(WriteError, match=message) if refused else contextlib.nullcontext():
        write(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize(
    ("number", "epochs"),
    [(1, None), (3, None), (5, 0), (7, 0), (9, 1), (10, 1), (13, 2)],
    ids=["config", "checkpoint 0", "metrics", "checkpoint 1", "line 1", "checkpoint 2", "results"],
)
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(
    number, epochs, npz, finished, tmp_path, monkeypatch, refusal
) -> None:
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        line = refusal(*options(npz, out, epochs=2))
    assert "cannot be written: No space left on device; what was there before is kept" in line
    assert not list(out.glob("*.part"))
    assert ("--resume" in line) == (number > 1)
    if epochs is not None:
        assert len(load_checkpoint(out / "checkpoint.pt")["history"]) == epochs
    assert main(["--resume", str(out)] if number > 1 else options(npz, out, epochs=2)) == 0
    assert metrics(out) == metrics(finished)
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(out).items())


@pytest.fixture
def small_disk(tmp_path):
    """A file system with little room."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(npz, small_disk, refusal) -> None:
    line = refusal(*options(npz, small_disk / "run", epochs=2))
    assert "checkpoint.pt cannot be written: No space left on device" in line
    assert [path.name for path in (small_disk / "run").iterdir()] == ["config.json"]


def test_a_folder_that_may_not_be_written_to(npz, small_disk, finished, refusal) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "cannot be made: Read-only file system" in refusal(*options(npz, small_disk / "run", epochs=2))
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    shutil.copy(finished / "config.json", small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "cannot be written to: Read-only file system" in refusal("--resume", str(small_disk))


def test_a_folder_without_permission(finished, copy, monkeypatch, refusal) -> None:
    """Permissions do not stop an administrator, so the system's answer is put in its place."""
    real = os.open

    def denied(path, flags, *mode):
        if flags & os.O_CREAT and Path(path).parent == copy:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *mode)

    monkeypatch.setattr(files.os, "open", denied)
    assert f"--resume {copy} cannot be written to: Permission denied" in refusal("--resume", str(copy))
    assert (copy / "results.json").read_text() == (finished / "results.json").read_text()
