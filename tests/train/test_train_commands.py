"""The commands as a shell runs them: their help, a reader that goes away, and Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastcl import __main__ as listing
from fastcl import command, info
from fastcl.train import __main__ as trainer
from fastcl.train import compare, study, systems
from fastcl.train.files import load_checkpoint
from tests.support.training import metrics, options

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
# The trainer, whose work after Ctrl-C never ends.
KEEPING = """
import sys, time
from fastcl import command
from fastcl.train import __main__ as cli, loop
def keep(self):
    print("keeping", flush=True)
    time.sleep(600)
loop.Run.keep = keep
command.run(cli.PROG, lambda: cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        (listing, ["python -m fastcl.train.compare", "--help"]),
        (info, ["examples:", "FASTCL_BACKEND=chunked"]),
        (trainer, ["method:", "images:", "training:", "run folder:", "--batch-classes", "--tensorboard", "examples:"]),
        (compare, ["study:", "images:", "--auxiliary", "examples:"]),
        (study, ["study:", "clusters:", "priors:", "batch:", "compare:", "images:", "examples:"]),
        (systems, ["comparison:", "images:", "--methods", "examples:"]),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else "",
)
def test_help(module, shown, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        module.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(part in text for part in shown)
    assert "Will be used" not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    "module", [listing, info, trainer, compare, systems, study], ids=lambda module: module.__name__
)
def test_unknown_options_are_refused_in_one_line(module, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        module.main(["--colour"])
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert errors.endswith("error: unrecognized arguments: --colour\n")
    assert errors.count("\n") == 1


def test_examples_in_the_help_are_commands_that_the_parsers_take() -> None:
    for module in (trainer, study):
        for line in module.EXAMPLES.splitlines():
            typed = line.strip().split("   ")[0]  # what follows says what it does
            arguments = typed.split("-m ", 1)[1].split()
            assert arguments[0] in listing.COMMANDS, line
            module._parser().parse_args(arguments[1:])


def test_the_list_of_commands_is_complete() -> None:
    commands = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / "fastcl").rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    assert commands == {"fastcl", *listing.COMMANDS}
    done = subprocess.run([sys.executable, "-m", "fastcl"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert all(f"python -m {name} " in done.stdout for name in listing.COMMANDS)


def closed_early(*arguments: str) -> tuple[int, str]:
    """Exit code and errors of a command whose output is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    finally:
        os.close(writing)
    return done.returncode, done.stderr


def test_a_reader_that_goes_away_ends_the_report() -> None:
    assert closed_early(sys.executable, "-m", "fastcl.info") == (command.PIPE_CLOSED, "")


def test_a_reader_that_goes_away_ends_a_run_that_can_go_on(npz, tmp_path) -> None:
    code, errors = closed_early(sys.executable, "-m", "fastcl.train", *options(npz, tmp_path / "run"))
    assert code == command.PIPE_CLOSED
    assert errors == (
        f"standard output was closed; kept 0 of 4 epochs. Go on with: {trainer.PROG} --resume {tmp_path / 'run'}\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_output_is_no_error() -> None:
    command = ["sh", "-c", f"{sys.executable} -m fastcl >&-"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_an_output_that_cannot_be_written_ends_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        arguments = [sys.executable, "-m", "fastcl.info"]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_interrupt_stops_at_once(npz, tmp_path) -> None:
    out = tmp_path / "run"
    arguments = [sys.executable, "-c", KEEPING, *options(npz, out, epochs=100_000)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
    try:
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        while "epochs of" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        while process.stdout.readline() != "keeping\n":
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == command.INTERRUPTED
    assert "interrupted again: stopped at once" in errors
    assert "Traceback" not in errors
    resumed = subprocess.run(
        [sys.executable, "-m", "fastcl.train", "--resume", out, "--lr", "0.5"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert "contradicts the resumed run's 0.002" in resumed.stderr  # it is a run that can be gone on with
    assert all(line["epoch"] == place for place, line in enumerate(metrics(out), 1))
    assert len(load_checkpoint(out / "checkpoint.pt")["history"]) >= len(metrics(out))


@pytest.mark.parametrize("number", [KeyboardInterrupt, BrokenPipeError, OSError(28, "No space left on device")])
def test_how_commands_end(number, capsys, monkeypatch) -> None:
    def main() -> int:
        raise number

    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    codes = {KeyboardInterrupt: command.INTERRUPTED, BrokenPipeError: command.PIPE_CLOSED}
    with pytest.raises(SystemExit) as exit_:
        command.run("prog", main)
    assert exit_.value.code == codes.get(number, 2)
    errors = capsys.readouterr().err
    assert errors.count("\n") == (0 if number is BrokenPipeError else 1)
    with pytest.raises(SystemExit) as exit_:
        command.run("prog", lambda: 7)
    assert exit_.value.code == 7
    with pytest.raises(SystemExit) as exit_:
        command.run("prog", lambda: sys.exit("install this"))
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "install this\n"
