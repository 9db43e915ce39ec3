"""The images of a report: which are shown, and as what."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from daskcurv.errors import DataError
from daskcurv.experiment.data import read_dataset
from daskcurv.experiment.data.preparation import decoded_before
from daskcurv.experiment.identity import Recorded
from daskcurv.report.figures import class_of, describe_sample
from daskcurv.report.findings import Findings
from daskcurv.report.statements import of_cohorts
from daskcurv.storage.attributes import identity_of

OVERALL = 20
PER_CLASS = 5
PICTURE = "most_curved"
"""Name of the figure of the most curved samples, where figures are written as files."""


@dataclass(frozen=True)
class Shown:
    """An image of a gallery."""

    source: str
    title: str
    value: str


@dataclass(frozen=True)
class Gallery:
    """Images under a heading."""

    name: str
    composition: str
    images: list[Shown]


def images_of(dataset: xr.Dataset, path: Path, copies: Path | None = None) -> NDArray[np.uint8]:
    """Read the images of a store's samples.

    Parameters
    ----------
    dataset : xarray.Dataset
    path : Path
        The training set, in any format.
    copies : Path, optional
        Where a launch decodes large sets to.

    Returns
    -------
    ndarray of uint8, shape (N, 3, height, width)

    Raises
    ------
    DataError
        If it cannot be read, or is not the data set that the store was computed from.
    """
    of_store = Recorded.of(identity_of(dataset)).dataset
    recorded = of_store.get("sha256")
    # The pictures do not depend on the normalisation, which a format need not know.
    data = read_dataset(path, mean=of_store.get("mean", 0), std=of_store.get("std", 1))
    if copies is not None:
        data = decoded_before(data, copies)
    label = dataset.label.values
    # Of imported results the labels are known, where a class was ever active.
    fits = len(data) == len(label) and bool(np.all((label < 0) | (label == data.labels)))
    if recorded not in (None, data.digest()) or not fits:
        raise DataError(
            f"{path} is another data set than the one that the results are of; name that one with "
            "--data_path"
        )
    return data.images


def overall(findings: Findings, images: NDArray[np.uint8]) -> list[Gallery]:
    """Return the most and the least curved samples, equally many of each cohort."""
    return [
        Gallery(f"{name} curved", of_cohorts(findings, some), _images(findings, images, some))
        for name, some in zip(("Most", "Least"), _extremes(findings), strict=True)
    ]


def _extremes(findings: Findings) -> tuple[list[int], list[int]]:
    """Return the most and the least curved samples, equally many of each cohort."""
    count = max(1, OVERALL // len(findings.cohort_starts))
    order = [
        _ranked(findings.curvature, findings.cohort == number)
        for number in range(len(findings.cohort_starts))
    ]
    counts = [_at_most(count, ranked) for ranked in order]
    ends = list(zip(order, counts, strict=True))
    most = [sample for ranked, number in ends for sample in ranked[::-1][:number].tolist()]
    return most, [sample for ranked, number in ends for sample in ranked[:number].tolist()]


def picture(findings: Findings, images: NDArray[np.uint8]) -> Figure:
    """Return the most curved samples as a figure."""
    samples, _ = _extremes(findings)
    rows = -(-len(samples) // 10)
    figure = Figure(figsize=(9, 1.3 * rows), layout="constrained")
    grid = figure.subplots(rows, min(10, len(samples)), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, sample in zip(grid.flat, samples, strict=False):
        axes.imshow(images[sample].transpose(1, 2, 0))
        label = class_of(findings.curvature[sample])
        axes.set_title(f"sample {sample}\nlabel: {label}", fontsize=7)
    return figure


def by_class(findings: Findings, images: NDArray[np.uint8]) -> list[tuple[str, list[list[Shown]]]]:
    """Return the most and the least curved samples of each class, by its name."""
    position = findings.dataset.class_position.values
    found = []
    for place in np.unique(position[position >= 0]).tolist():
        order = _ranked(findings.curvature, position == place)
        if not len(order):
            continue
        count = _at_most(PER_CLASS, order)
        galleries = [
            _images(findings, images, some.tolist(), labelled=False)
            for some in (order[::-1][:count], order[:count])
        ]
        found.append((class_of(findings.curvature[order[0]]), galleries))
    return found


def _at_most(count: int, ranked: NDArray[np.intp]) -> int:
    """Return how many to show of each end, so that none is shown at both."""
    return min(count, len(ranked) // 2 or 1)


def _ranked(curvature: xr.DataArray, member: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return the members whose curvature is known, the least curved first."""
    values = curvature.values
    chosen = np.flatnonzero(member & ~np.isnan(values))
    ranked: NDArray[np.intp] = chosen[np.argsort(values[chosen], kind="stable")]
    return ranked


def _images(
    findings: Findings,
    images: NDArray[np.uint8],
    samples: Sequence[int],
    labelled: bool = True,
) -> list[Shown]:
    return [
        Shown(
            source=data_uri(_png(images[sample]), "png"),
            title=describe_sample(findings.curvature[sample], labelled),
            value=f"{float(findings.curvature[sample]):.3g}",
        )
        for sample in samples
    ]


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    # Pillow wants a grey image without its one channel.
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Return the contents of an image as an address that holds all of it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
