"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

import daskcurv
from daskcurv import analysis
from daskcurv.dataset import read_cifar
from daskcurv.errors import DataError, StoreWriteError
from daskcurv.files import write_whole
from daskcurv.report.figures import describe_sample
from daskcurv.report.findings import LEVELS, Findings
from daskcurv.storage.attributes import identity_of

OVERALL = 20
PER_CLASS = 5


@dataclass(frozen=True)
class Shown:
    """An image of a gallery."""

    source: str
    title: str
    value: str


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
        facts=facts(store, findings),
        figures={name: _data_uri(content, "svg+xml") for name, content in vectors.items()},
        drawn=len(findings.epochs),
        epochs=findings.dataset.sizes["epoch"],
        first=int(findings.dataset.epoch[0]),
        last=int(findings.dataset.epoch[-1]),
        correlation=_correlation(findings),
        probes=identity_of(findings.dataset)["estimator"]["n_probes"],
        typical_error=_typical_error(findings),
        overall=[] if images is None else _overall(findings, images),
        classes=[] if images is None else _by_class(findings, images),
        version=daskcurv.__version__,
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )  # fmt: skip
    _write(out, text.encode())


def images_of(dataset: xr.Dataset, path: Path) -> NDArray[np.uint8]:
    """Read the images of a store's samples.

    Parameters
    ----------
    dataset : xarray.Dataset
    path : Path
        Directory in CIFAR-100's python format.

    Returns
    -------
    ndarray of uint8, shape (N, 3, height, width)

    Raises
    ------
    DataError
        If it cannot be read, or is not the data set that the store was computed from.
    """
    cifar = read_cifar(path)
    recorded = identity_of(dataset).get("dataset", {}).get("sha256")
    if recorded not in (None, cifar.digest()) or len(cifar) != dataset.sizes["sample"]:
        raise DataError(
            f"{path} is another data set than the one that the results are of; name that one with "
            "--data_path"
        )
    return cifar.images


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


def facts(store: Path, findings: Findings) -> list[tuple[str, str]]:
    """Return what was run, as names and values."""
    dataset = findings.dataset
    identity = identity_of(dataset)
    estimator = identity["estimator"]
    complete = int(dataset.complete.sum())
    seconds = float(dataset.compute_seconds.sum())
    samples = int(findings.active_epochs.sum())
    methods = sorted({text for text in map(str, dataset.method.values) if text})
    rows = [
        ("store", str(store.absolute())),
        ("fingerprint", dataset.attrs["fingerprint"]),
        ("epochs", f"{dataset.sizes['epoch']:,}, of which {complete:,} are complete"),
        ("samples", f"{dataset.sizes['sample']:,}; {samples:,} values of samples at epochs"),
        ("network", _plain(identity.get("model", {})) or "not known"),
        ("estimator", _plain(estimator)),
        ("computed by", ", ".join(methods) or "not known"),
        ("loss over", f"{identity.get('head', 'not known')} outputs"),
        ("classes", _plain(identity.get("classes", {}), leave_out=("order",)) or "not known"),
        ("data set", _plain(identity.get("dataset", {}))),
        ("class order", str(dataset.attrs.get("class_order_source", "not known"))),
        ("weights", _weights(dataset)),
        ("written by", f"daskcurv {dataset.attrs.get('daskcurv_version', 'not known')}"),
    ]
    if seconds:
        rows.append(
            (
                "throughput",
                f"{samples / seconds:,.1f} samples/s per worker, "
                f"{timedelta(seconds=round(seconds))} of worker time, "
                f"at most {int(dataset.num_workers.max())} workers at an epoch",
            )
        )
    return rows


def _weights(dataset: xr.Dataset) -> str:
    """Return the first and the last checkpoint; the store has all of them on record."""
    files = [
        f"{name} (sha256 {sha256})" if sha256 else str(name)
        for name, sha256 in zip(
            dataset.checkpoint.values, dataset.checkpoint_sha256.values, strict=True
        )
        if name
    ]
    return " to ".join(dict.fromkeys([files[0], files[-1]])) if files else "not known"


def _plain(values: Mapping[str, Any], leave_out: Sequence[str] = ()) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if name not in leave_out)


def _correlation(findings: Findings) -> str:
    measures = xr.Dataset({"curvature": findings.curvature, "loss": findings.loss})
    matrix = analysis.rank_correlation(measures)
    value = float(matrix[0, 1])
    return "not defined" if np.isnan(value) else f"{value:.3f}"


def _typical_error(findings: Findings) -> str:
    """Return the median over epochs of the median relative sampling error."""
    medians = findings.relative_errors[:, LEVELS.index(0.5)]
    return f"{np.nanmedian(medians):.1%}" if np.isfinite(medians).any() else "not known"


def _overall(findings: Findings, images: NDArray[np.uint8]) -> list[tuple[str, list[Shown]]]:
    order = _ranked(findings.curvature, np.ones(findings.curvature.size, bool))
    return [
        ("Most curved", _images(findings, images, order[::-1][:OVERALL])),
        ("Least curved", _images(findings, images, order[:OVERALL])),
    ]


def _by_class(findings: Findings, images: NDArray[np.uint8]) -> list[tuple[str, list[list[Shown]]]]:
    position = findings.dataset.class_position.values
    found = []
    for place in np.unique(position[position >= 0]).tolist():
        order = _ranked(findings.curvature, position == place)
        if not len(order):
            continue
        name = describe_sample(findings.curvature[order[0]]).partition(", ")[2]
        count = min(PER_CLASS, len(order) // 2 or 1)
        galleries = [
            _images(findings, images, order[::-1][:count], labelled=False),
            _images(findings, images, order[:count], labelled=False),
        ]
        found.append((name, galleries))
    return found


def _ranked(curvature: xr.DataArray, member: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the members whose curvature is known, the least curved first."""
    values = curvature.values
    chosen = np.flatnonzero(member & ~np.isnan(values))
    ranked: NDArray[np.intp] = chosen[np.argsort(values[chosen], kind="stable")]
    return ranked


def _images(
    findings: Findings,
    images: NDArray[np.uint8],
    samples: NDArray[np.intp],
    labelled: bool = True,
) -> list[Shown]:
    def title(sample: int) -> str:
        text = describe_sample(findings.curvature[sample])
        return text if labelled else text.partition(",")[0]

    return [
        Shown(
            source=_data_uri(_png(images[sample]), "png"),
            title=title(sample),
            value=f"{float(findings.curvature[sample]):.3g}",
        )
        for sample in samples.tolist()
    ]


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "png")
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {path}: {error.strerror}; name another place"
        ) from error
