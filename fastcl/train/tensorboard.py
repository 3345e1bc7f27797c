"""The metrics of a run for TensorBoard."""

from pathlib import Path
from typing import Any

from fastcl.train import OptionError, WriteError

NAMES = ("loss", "knn", "lr")


class Board:
    """Writes lines of metrics.jsonl as events into ``tensorboard/`` of the run folder; a context manager."""

    def __init__(self, folder: Path, history: list[dict[str, Any]]) -> None:
        """history: the lines so far, which are written first: the folder has each epoch once, however often a run was
        resumed, and whether or not all of it was with TensorBoard."""
        writer = self.require()
        place = folder / "tensorboard"
        if place.is_symlink():
            raise OptionError(f"--tensorboard writes into {place}, which must not be a link")
        try:
            for earlier in place.glob("events.out.tfevents.*"):
                earlier.unlink()
            self._writer = writer(str(place))
        except OSError as error:
            raise WriteError(f"{place} cannot be written: {error.strerror}") from error
        for line in history:
            self.add(line)

    @staticmethod
    def require() -> Any:
        """The class that writes events; OptionError where the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError("--tensorboard needs tensorboard: pip install tensorboard") from error
        return SummaryWriter

    def add(self, line: dict[str, Any]) -> None:
        """The numbers of an epoch, at its last step."""
        try:
            for name in NAMES:
                if name in line:
                    self._writer.add_scalar(name, line[name], line["step"])
            self._writer.flush()
        except OSError as error:
            raise WriteError(f"the events of --tensorboard cannot be written: {error.strerror}") from error

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()
