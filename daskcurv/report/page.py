"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import daskcurv
from daskcurv.atomic import write_whole
from daskcurv.errors import StoreWriteError
from daskcurv.report import galleries, statements
from daskcurv.report.findings import Findings
from daskcurv.storage.attributes import identity_of


def write_page(
    out: Path,
    store: Path,
    findings: Findings,
    vectors: Mapping[str, bytes],
    images: NDArray[np.uint8] | None,
) -> None:
    """Write the page.

    Parameters
    ----------
    out : Path
        Replaced if it exists.
    store : Path
        For the title.
    findings : Findings
    vectors : mapping
        Figures as SVG, by name.
    images : ndarray of uint8, shape (N, 3, height, width), optional
        Without them there are no galleries.

    Raises
    ------
    StoreWriteError
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("daskcurv.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("page.html.jinja").render(
        title=store.name,
        facts=statements.facts(store, findings),
        imported=findings.imported,
        figures={name: galleries.data_uri(text, "svg+xml") for name, text in vectors.items()},
        drawn=len(findings.epochs),
        epochs=findings.dataset.sizes["epoch"],
        first=int(findings.dataset.epoch[0]),
        last=int(findings.dataset.epoch[-1]),
        definition=statements.definition(findings),
        left_out=statements.left_out(findings),
        not_usable=statements.not_usable(findings),
        comparability=statements.comparability(findings),
        correlations=statements.correlations(findings),
        held_out=statements.held_out(findings),
        sampling_errors=statements.sampling_errors(findings),
        hollow=not bool(findings.trajectories.trained.all()),
        probes=identity_of(findings.dataset)["estimator"]["n_probes"],
        overall=[] if images is None else galleries.overall(findings, images),
        classes=[] if images is None else galleries.by_class(findings, images),
        version=daskcurv.__version__,
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )
    _write(out, text.encode())


def write_figures(directory: Path, pictures: Mapping[str, Mapping[str, bytes]]) -> None:
    """Write figures into a directory of their own.

    Parameters
    ----------
    directory : Path
    pictures : mapping
        By kind, such as ``"svg"``, and name.

    Raises
    ------
    StoreWriteError
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreWriteError(
            f"cannot create {directory} for the figures: {error.strerror}; name another directory"
        ) from error
    for kind, contents in pictures.items():
        for name, content in contents.items():
            _write(directory / f"{name}.{kind}", content)


def render(figures: Mapping[str, Figure], kind: str) -> dict[str, bytes]:
    """Return figures as the contents of files, ``"png"`` (200 dpi) or ``"svg"``, by name."""
    return {name: _rendered(figure, kind) for name, figure in figures.items()}


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with mpl.rc_context({"svg.hashsalt": "daskcurv"}):
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {path}: {error.strerror}; name another place"
        ) from error
