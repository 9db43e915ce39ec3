"""The tutorial, run as it stands on the demo's store."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from daskcurv.storage.attributes import identity_of
from tests.support.project import REPOSITORY

STEPS = re.findall(
    r"```python\n(.*?)```\n```text\n(.*?)```",
    (REPOSITORY / "docs" / "tutorial.md").read_text(),
    re.DOTALL,
)


def without_numbers(text: str) -> str:
    """Return a text with all numbers alike: trained elsewhere, weights differ a little."""
    # NumPy fills up a shorter number of an array with spaces.
    return re.sub(r" +", " ", re.sub(r"[+-]?\d[\d.]*", "0", text)).replace(" ]", "]")


def test_the_tutorial_prints_what_it_shows_and_finds_what_it_says(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo[0])
    found: dict[str, Any] = {}
    assert len(STEPS) == 5
    for code, shown in STEPS:
        capsys.readouterr()
        exec(compile(code, "tutorial.md", "exec"), found)
        assert without_numbers(capsys.readouterr().out) == without_numbers(shown)

    flipped = found["flipped"]
    for score in found["scores"].values():
        assert roc_auc_score(flipped, score) > 0.9
    assert flipped[found["suspects"]].mean() > 0.8
    assert found["early_share"] > 0.5
    assert found["late_share"] > 0.25
    learned, trained_on = found["learned"], found["trained_on"]
    assert learned[flipped & trained_on].mean() < 0.5
    assert learned[~flipped & trained_on].mean() > 0.95
    results = found["results"]
    curvature = results.curvature.sel(epoch=12)
    wrong, right = (curvature[kind & trained_on].median() for kind in (flipped, ~flipped))
    assert wrong > 10 * right
    order = identity_of(results)["classes"]["order"]
    old = np.isin(results.label.values, order[:5])
    loss, correct, curved = (
        results[name].values[6:9].astype(float) for name in ("loss", "accuracy", "curvature")
    )
    losses, accuracy = loss[:, old].mean(axis=1), correct[:, old].mean(axis=1)
    assert losses[1] > 1.5 * losses[0]
    assert accuracy[1] < accuracy[0] - 0.03
    assert accuracy[2] > accuracy[1] + 0.02
    curvatures = curved[:, old].mean(axis=1)
    assert curvatures[2] < curvatures[0]
    assert curved[2, ~old].mean() < 2 * curvatures[2]
    change = found["change"]
    assert (int(change.epoch_before), int(change.epoch_after)) == (6, 7)
    assert float(change) == pytest.approx(accuracy[1] - accuracy[0])
