"""The reference trainer: ``python -m fastcl.train`` trains an encoder on real images and probes what it learned."""

from dataclasses import dataclass


class OptionError(ValueError):
    """An option, or a file that an option names, cannot be used; the command line prints it in one line."""


class WriteError(OptionError):
    """A file cannot be written: the disk is full, or the folder may not be written to."""


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers (``config.json``); the field names are the option names.

    ``device`` is the exception: a run may be resumed on another one.
    """

    method: str = "simclr"
    clusters: str | None = None
    n_clusters: int = 20
    renew: int = 10
    prior: str | None = None
    data: str = "digits"
    root: str | None = None
    glyphs: int | None = None
    side: int | None = None
    long_tail: float | None = None
    epochs: int = 120
    batch_size: int = 1024
    batch_classes: int | None = None
    temperature: float = 0.1
    lr: float = 2e-3
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
