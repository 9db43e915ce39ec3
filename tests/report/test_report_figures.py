"""What each figure of a report draws, against numbers computed here from what a store was given."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from daskcurv.report import findings as gathering
from daskcurv.report.figures import FIGURES, LINES, draw
from daskcurv.report.findings import Findings, gather
from tests.support.reports import EPOCHS, FIRST_TRAINED, PROBES, Made, Values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made") / "made.zarr")


@pytest.fixture(scope="module")
def findings(made: Made) -> Findings:
    return gather(made.path, samples=[8, 40, 71])


@pytest.fixture(scope="module")
def figures(findings: Findings) -> dict[str, Figure]:
    drawn = draw(findings)
    assert [*drawn] == [*FIGURES]
    return drawn


def curves(axes: Axes) -> list[Values]:
    """The heights of what is drawn over epochs, without the lines of task boundaries."""
    lines = [line for line in axes.lines if len(np.asarray(line.get_xdata())) == len(EPOCHS)]
    for line in lines:
        np.testing.assert_array_equal(line.get_xdata(), EPOCHS)
    return [np.asarray(line.get_ydata(), float) for line in lines]


def boundaries(axes: Axes) -> list[float]:
    return [float(x[0]) for line in axes.lines if len(x := np.asarray(line.get_xdata())) == 2]


def bands(axes: Axes) -> list[tuple[Values, Values]]:
    """The lower and upper ends of each band, NaN at epochs without."""
    found = []
    for collection in axes.collections:
        assert isinstance(collection, PolyCollection)
        low, high = np.full(len(EPOCHS), np.nan), np.full(len(EPOCHS), np.nan)
        corners = np.concatenate([path.vertices for path in collection.get_paths()])
        for place, epoch in enumerate(EPOCHS):
            at = corners[corners[:, 0] == epoch, 1]
            if len(at):
                low[place], high[place] = at.min(), at.max()
        found.append((low, high))
    return found


def shown(figure: Figure) -> list[Axes]:
    """The panels that are not blank."""
    return [axes for axes in figure.axes if axes.axison]


def test_lines_are_the_medians_of_each_cohort_where_it_was_trained_on(made, figures):
    (axes,) = figures["cohort_medians"].axes
    for cohort, line in enumerate(curves(axes)):
        expected = made.quantiles(0.5, made.curvature, made.cohort == cohort)
        np.testing.assert_allclose(line, expected, rtol=1e-12)
        np.testing.assert_array_equal(np.isfinite(line), FIRST_TRAINED[cohort] <= EPOCHS)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"added at epoch {epoch}" for epoch in (0, 4, 8)
    ]
    assert boundaries(axes) == [4, 10], "the first epochs of tasks that the store has"
    assert axes.get_yscale() == "log"


def test_bands_hold_nine_tenths_and_a_half_of_each_cohort(made, figures):
    panels = shown(figures["cohort_bands"])
    assert len(panels) == 3
    for cohort, axes in enumerate(panels):
        member = made.cohort == cohort
        assert axes.get_title() == f"added at epoch {4 * cohort}\n{member.sum()} samples"
        (line,) = curves(axes)
        np.testing.assert_allclose(line, made.quantiles(0.5, made.curvature, member), rtol=1e-12)
        for (low, high), levels in zip(bands(axes), ((0.05, 0.95), (0.25, 0.75)), strict=True):
            for drawn, level in ((low, levels[0]), (high, levels[1])):
                expected = made.quantiles(level, made.curvature, member)
                np.testing.assert_allclose(drawn, expected, rtol=1e-12)


def test_a_column_of_the_heat_map_is_one_epoch_and_a_row_one_class(made, figures):
    axes = figures["classes"].axes[0]
    (mesh,) = axes.collections
    assert isinstance(mesh, QuadMesh)
    cells: Values = np.ma.asarray(mesh.get_array()).filled(np.nan).reshape(6, len(EPOCHS))
    for position in range(6):
        member = made.position == position
        for column, epoch in enumerate(EPOCHS):
            some = made.curvature[column, member & made.trained[column]]
            assert len(some) == (member.sum() if epoch >= FIRST_TRAINED[position // 2] else 0)
            expected = some.mean() if len(some) else np.nan
            np.testing.assert_allclose(cells[position, column], expected, rtol=1e-6)
    corners = np.asarray(mesh.get_coordinates())
    np.testing.assert_array_equal(corners[0, :, 0], np.arange(7) - 0.5)
    assert axes.get_xticks().tolist() == [*range(6)]
    assert [text.get_text() for text in axes.get_xticklabels()] == [str(e) for e in EPOCHS]
    order = [made.label[made.position == position][0] for position in range(6)]
    assert [text.get_text() for text in axes.get_yticklabels()] == [str(label) for label in order]
    assert axes.yaxis.get_inverted()
    assert boundaries(axes) == [1.5, 4.5], "before the columns of epochs 4 and 10"


def test_each_histogram_is_of_one_cohort_at_one_epoch(made, figures):
    panels = shown(figures["distributions"])
    # Epoch 0 has no results that count; of the other five, four are evenly spread.
    assert [axes.get_title() for axes in panels] == [f"epoch {epoch}" for epoch in (3, 4, 7, 10)]
    for axes, row in zip(panels, (1, 2, 4, 5), strict=True):
        cohorts = [c for c in range(3) if EPOCHS[row] >= FIRST_TRAINED[c]]
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == [
            f"added at epoch {4 * c} ({(made.cohort == c).sum()})" for c in cohorts
        ]
        for patch, cohort in zip(axes.patches, cohorts, strict=True):
            values = made.curvature[row, made.cohort == cohort]
            outline = np.asarray(patch.get_path().vertices)
            edges, heights = outline[1::2, 0], outline[1:-1:2, 1]
            expected = np.histogram(values[values > 0], edges)[0] / len(values)
            np.testing.assert_allclose(heights, expected, atol=1e-12)
            assert heights.sum() == pytest.approx((values > 0).mean()), "none is outside"
            assert to_hex(patch.get_edgecolor()) == LINES[cohort][0].lower()


def test_held_out_samples_are_drawn_beside_the_trained_ones_of_their_cohort(made, figures):
    panels = shown(figures["held_out"])
    for cohort, axes in enumerate(panels):
        members = [(made.cohort == cohort) & (made.split == part) for part in (0, 1)]
        counts = f"{members[0].sum()} trained, {members[1].sum()} held out"
        assert axes.get_title() == f"added at epoch {4 * cohort}\n{counts}"
        for member, line, (low, high) in zip(members, curves(axes), bands(axes), strict=True):
            for drawn, level in ((low, 0.25), (line, 0.5), (high, 0.75)):
                expected = made.quantiles(level, made.curvature, member)
                np.testing.assert_allclose(drawn, expected, rtol=1e-12)
    assert len(panels) == 3
    legend = panels[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["trained", "held out"]


def test_each_cloud_is_a_cohorts_means_over_the_epochs_trained_on(made, figures):
    (axes,) = figures["against_loss"].axes
    curvature, loss = made.mean(made.curvature), made.mean(made.loss)
    for cohort, cloud in enumerate(axes.collections):
        assert isinstance(cloud, PathCollection)
        own = (made.cohort == cohort) & (curvature > 0)
        points = np.asarray(cloud.get_offsets())
        np.testing.assert_allclose(points[:, 0], loss[own], rtol=1e-6)
        np.testing.assert_allclose(points[:, 1], curvature[own], rtol=1e-6)
        assert cloud.get_label() == f"added at epoch {4 * cohort} ({own.sum()})"
        assert to_hex(np.asarray(cloud.get_facecolor())[0]) == LINES[cohort][0].lower()
    assert len(axes.collections) == 3


def test_a_samples_curve_is_hollow_where_the_weights_were_untrained(made, figures):
    figure = figures["trajectories"]
    (axes,) = figure.axes
    drawn = curves(axes)
    hollow = [line.get_markerfacecolor() == "none" for line in axes.lines[: len(drawn)]]
    assert hollow == [False, True] * 3
    error = np.sqrt(np.maximum(made.square - made.curvature**2, 0) / (PROBES - 1))
    for place, sample in enumerate((8, 40, 71)):
        values, trained = made.curvature[:, sample], made.trained[:, sample]
        solid = np.where(trained, values, np.nan)
        np.testing.assert_array_equal(drawn[2 * place], solid)
        np.testing.assert_array_equal(drawn[2 * place + 1], np.where(trained, np.nan, values))
        low, high = bands(axes)[place]
        np.testing.assert_allclose(high, solid + error[:, sample], rtol=1e-5)
        floor = np.nanmin(solid) / 10
        expected = np.maximum(solid - error[:, sample], floor)
        np.testing.assert_allclose(low, expected, rtol=1e-4, atol=1e-9)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"sample {sample}, {made.label[sample]}" + ", held out" * int(made.split[sample])
        for sample in (8, 40, 71)
    ]


def test_sampling_errors_are_relative_and_of_each_cohort(made, figures):
    (axes,) = figures["sampling_error"].axes
    error = np.sqrt(np.maximum(made.square - made.curvature**2, 0) / (PROBES - 1))
    error = np.divide(error, made.curvature, out=np.full_like(error, np.nan), where=error > 0)
    for cohort, (line, (low, high)) in enumerate(zip(curves(axes), bands(axes), strict=True)):
        member = made.cohort == cohort
        for drawn, level in ((low, 0.25), (line, 0.5), (high, 0.75)):
            expected = made.quantiles(level, error, member)
            np.testing.assert_allclose(drawn, expected, rtol=1e-5)
    assert len(axes.collections) == 3
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0


def test_of_many_cohorts_a_bar_says_which_colour_is_which(tmp_path, monkeypatch):
    monkeypatch.setattr("daskcurv.report.figures.LINES", LINES[:2])
    figures = draw(gather(Made(tmp_path / "made.zarr").path))
    for name in ("cohort_medians", "distributions", "against_loss", "sampling_error"):
        bar = figures[name].axes[-1]
        assert [text.get_text() for text in bar.get_yticklabels()] == ["0", "4", "8"]
        assert not any(axes.get_legend() for axes in figures[name].axes)
    lines = figures["cohort_medians"].axes[0].lines[:3]
    colours = [to_hex(to_rgba(line.get_color())) for line in lines]
    assert len({*colours}) == 3
    clouds = figures["against_loss"].axes[0].collections
    assert [to_hex(np.asarray(cloud.get_facecolor())[0]) for cloud in clouds] == colours


def test_epochs_that_are_not_trained_on_are_drawn_on_request(made):
    found = gather(made.path, include_untrained=True)
    (axes,) = draw(found)["cohort_medians"].axes
    for cohort, line in enumerate(curves(axes)):
        np.testing.assert_array_equal(np.isfinite(line), 4 * cohort <= EPOCHS)
        assert line[np.isfinite(line)][0] == (1e3 if cohort < 2 else pytest.approx(line[-1]))
    mean = np.nanmean(np.where(made.active, made.curvature, np.nan), axis=0)
    np.testing.assert_allclose(found.curvature, mean, rtol=1e-12)


def test_of_many_epochs_some_are_drawn_and_means_are_over_all(made, monkeypatch):
    monkeypatch.setattr(gathering, "MOST_EPOCHS", 2)
    found = gather(made.path)
    # The ends of the store, and both sides of each boundary.
    assert found.epochs.tolist() == [0, 3, 4, 7, 10]
    np.testing.assert_allclose(found.curvature, made.mean(made.curvature), rtol=1e-12)
