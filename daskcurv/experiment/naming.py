"""How weight files are named, and those of a training run found by their names."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from daskcurv.errors import CheckpointError, ConfigError
from daskcurv.places import listed, names_in

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Naming:
    """How a training run names its weight files.

    Attributes
    ----------
    patterns : tuple of str
        Names with ``{epoch}``, and ``{experiment}`` if several runs share a directory.
    alike : str
        Regular expression that finds experiment and epoch in names that are spelled differently, or
        have something added; by default such names are not looked for.
    """

    patterns: tuple[str, ...]
    alike: str = "(?!)"

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if pattern.count("{epoch}") != 1 or pattern.count("{experiment}") > 1:
                raise ConfigError(
                    f"the name pattern {pattern!r} has to have {{epoch}} once, and {{experiment}} "
                    "at most once"
                )

    def example(self, experiment_index: int | str, epoch: int | str) -> str:
        """Return the name of a file."""
        name = self.patterns[0].replace("{experiment}", str(experiment_index))
        return name.replace("{epoch}", str(epoch))

    def parse(self, name: str, experiment_index: int) -> tuple[int, int] | None:
        """Return the experiment and the epoch that a name stands for, or None if for none.

        A name that does not say its experiment is of any.
        """
        for pattern in self.patterns:
            expression = re.escape(pattern).replace(r"\{epoch\}", r"(?P<epoch>\d{1,9})")
            expression = expression.replace(r"\{experiment\}", r"(?P<experiment>\d{1,9})")
            if match := re.fullmatch(expression, name):
                found = match.groupdict()
                return int(found.get("experiment", experiment_index)), int(found["epoch"])
        return None


INCREMENTAL_CIFAR = Naming(
    ("index-{experiment}_epoch-{epoch}.pt", "checkpoint_index-{experiment}_epoch-{epoch}.pt"),
    alike=r"(?i)index\D{0,3}(\d{1,9})\D{1,3}epoch\D{0,3}(\d{1,9})",
)
"""The older and the newer names of the training run that the documentation describes."""


def discover(
    model_dir: Path, experiment_index: int, naming: Naming = INCREMENTAL_CIFAR
) -> dict[int, Path]:
    """Find an experiment's checkpoints.

    Parameters
    ----------
    model_dir : Path
    experiment_index : int
    naming : Naming

    Returns
    -------
    dict
        File by epoch, in the order of epochs.

    Raises
    ------
    CheckpointError
        If the directory cannot be read or two files claim one epoch.
    """
    try:
        names = names_in(model_dir)
    except OSError as error:
        raise CheckpointError(
            f"model directory {model_dir} cannot be read ({error.strerror}); point --model_dir at "
            f"the directory that holds {naming.example('…', '…')}"
        ) from error
    found: dict[int, Path] = {}
    others = set()
    alike: dict[int, str] = {}
    for name in names:
        parsed = naming.parse(name, experiment_index)
        if parsed is None:
            if (other := re.search(naming.alike, name)) and int(other[1]) == experiment_index:
                alike[int(other[2])] = name
            continue
        index, epoch = parsed
        if index != experiment_index:
            others.add(index)
            continue
        if epoch in found:
            raise CheckpointError(
                f"{model_dir} has two files for epoch {epoch}: {found[epoch].name} and {name}; "
                "remove or move one"
            )
        found[epoch] = model_dir / name
    if unused := sorted(alike.keys() - found.keys()):
        log.warning(
            "%s has files that look like checkpoints of other epochs but are not named "
            "%s; they are not used: %s. Rename those that are checkpoints",
            model_dir,
            naming.example(experiment_index, "…"),
            listed([alike[epoch] for epoch in unused]),
        )
    if not found:
        hint = f"; it has index {', '.join(map(str, sorted(others)))}" if others else ""
        raise CheckpointError(
            f"{model_dir} has no checkpoint of experiment index {experiment_index}{hint}; expected "
            f"files like {naming.example(experiment_index, 0)}"
        )
    return dict(sorted(found.items()))
